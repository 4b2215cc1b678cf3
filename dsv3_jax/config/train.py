"""How a network is computed, its data and its training: the sections of `TrainConfig`."""

import dataclasses
import math
from typing import Literal

from dsv3_jax.config.checks import require
from dsv3_jax.config.cluster import ClusterConfig
from dsv3_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """How the network is computed; only the two precisions change what comes out, by rounding.

    `compute_dtype`: activations and the weights they meet ("bfloat16" or "float32"); gate,
    softmax, norm statistics and logits are always float32.
    `fp8_experts`: the routed experts' products in FP8, forward and both gradients (report section
    3.3); parameters, their gradients' sums and everything else stay as they are.
    `remat_policy`: what the backward pass recomputes: "none" keeps everything, "full" keeps only
    each layer's input, "dots" keeps the results of weight matmuls, "attention" keeps each layer's
    attention output.
    `unroll_layers`: writes the loop over layers out: faster steps (no copies of what the backward
    pass keeps) for a compilation that grows with the layers.
    `grouped_matmul`: implementation of the experts' products in `pallas_kernels`; null picks one.
    `expert_buffer_factor`: rows that a device of the expert axis can receive at once, over an
    equal share; never more than can arrive. `on_overflow`: where more come, "exact" lets the rest
    travel in further rounds (slower, the same result), "stop" ends the run.
    `expert_exchange`: how rows travel between devices of the expert axis: "ragged", each device's
    as many as they are, or "slots", an equal slot for every pair of devices; null picks one.
    """

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    fp8_experts: bool = False
    remat_policy: Literal["none", "full", "dots", "attention"] = "full"
    unroll_layers: bool = False
    grouped_matmul: str | None = None
    expert_buffer_factor: float = 2.0
    on_overflow: Literal["exact", "stop"] = "exact"
    expert_exchange: Literal["ragged", "slots"] | None = None

    def __post_init__(self) -> None:
        factor = self.expert_buffer_factor
        # Below 1 not even balanced rows would fit.
        require(
            1 <= factor < math.inf,
            f"expert_buffer_factor={factor} must be at least 1",
            "RuntimeConfig",
        )


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the device mesh's axes; they multiply to the number of devices.

    One of them may be -1: as many as are left. All 1 (the default) is one device, without a mesh.
    `replica`: copies of everything, each with its own sequences (data parallelism across slices).
    `fsdp`: sequences again, with parameters, gradients and moments shared out (ZeRO-3).
    `expert`: sequences again, and the routed experts shared out; tokens travel to them.
    `tensor`: attention heads and the width of every FFN. `context`: positions of a sequence.
    """

    replica: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(
                size >= 1 or size == -1, f"{name}={size} must be positive or -1", "ParallelConfig"
            )
        inferred = [name for name, size in sizes.items() if size == -1]
        require(
            len(inferred) <= 1, f"only one of {' and '.join(inferred)} may be -1", "ParallelConfig"
        )

    @property
    def is_one_device(self) -> bool:
        """Whether no mesh is asked for."""
        return all(size == 1 for size in dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokens and packing (report section 4.1).

    `corpus`: "stdlib" (the running Python's standard library, held out by whole packages) or a
    path to a file or folder of text, source, .jsonl or .parquet files.
    `held_out`: a second path for evaluation; null holds out whole documents of `corpus`
    (fraction `held_out_fraction`, chosen by a hash of the document's name).
    `text_field`: the field that holds the text in .jsonl and .parquet rows.
    `tokenizer`: "corpus-bpe" (byte-level BPE of `model.vocab_size` entries trained on the corpus
    and cached), "deepseek-v3" (the released 128K tokenizer), or a `tokenizer.json` path.
    `fim_rate`: share of documents rewritten as Fill-in-Middle, prefix-suffix-middle order.
    `cache_dir`: tokenizers and token files are kept here; null is `~/.cache/dsv3_jax`.
    """

    corpus: str = "stdlib"
    held_out: str | None = None
    held_out_fraction: float = 0.05
    text_field: str = "text"
    tokenizer: str = "corpus-bpe"
    sequence_length: int = 4096
    fim_rate: float = 0.1
    seed: int = 0
    cache_dir: str | None = None
    prefetch: int = 4

    def __post_init__(self) -> None:
        place = "DataConfig"
        require(
            self.sequence_length >= 2,
            f"sequence_length={self.sequence_length} must be at least 2",
            place,
        )
        require(0 <= self.fim_rate <= 1, f"fim_rate={self.fim_rate} must be in [0, 1]", place)
        require(
            0 < self.held_out_fraction < 1,
            f"held_out_fraction={self.held_out_fraction} must be in (0, 1)",
            place,
        )
        require(self.seed >= 0, f"seed={self.seed} must not be negative", place)
        require(self.prefetch >= 1, f"prefetch={self.prefetch} must be at least 1", place)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sequences an optimizer step and how they are split (report section 4.2).

    The batch grows from `initial_size` to `size` over the first `ramp_tokens` tokens, in
    `ramp_stages` equal stages, by accumulating more microbatches of `microbatch_size` sequences.
    `initial_size` null means no ramp.
    """

    size: int = 15360
    microbatch_size: int = 15360
    initial_size: int | None = None
    ramp_tokens: int = 0
    ramp_stages: int = 5

    def __post_init__(self) -> None:
        place = "BatchConfig"
        first = self.size if self.initial_size is None else self.initial_size
        for name in ("size", "microbatch_size", "ramp_stages"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be positive", place)
        require(
            0 < first <= self.size,
            f"initial_size={first} must be positive and at most size={self.size}",
            place,
        )
        for name, value in (("size", self.size), ("initial_size", first)):
            require(
                value % self.microbatch_size == 0,
                f"{name}={value} must be divisible by microbatch_size={self.microbatch_size}",
                place,
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its five-part learning rate (report section 4.2).

    Linear warm-up over `warmup_steps` steps to `peak_lr`; constant until `constant_tokens`;
    cosine over `decay_tokens` to `decay_lr`; constant for `hold_tokens`; then `final_lr`.
    """

    peak_lr: float = 2.2e-4
    warmup_steps: int = 2000
    constant_tokens: int = 10_000_000_000_000
    decay_tokens: int = 4_300_000_000_000
    decay_lr: float = 2.2e-5
    hold_tokens: int = 333_000_000_000
    final_lr: float = 7.3e-6
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_skipped_in_a_row: int = 10

    def __post_init__(self) -> None:
        place = "OptimizerConfig"
        for name in ("peak_lr", "decay_lr", "final_lr", "weight_decay"):
            value = getattr(self, name)
            sound = math.isfinite(value) and value >= 0
            require(sound, f"{name}={value} must be finite and not negative", place)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} must be in [0, 1)", place)
        for name in ("warmup_steps", "constant_tokens", "decay_tokens", "hold_tokens"):
            value = getattr(self, name)
            require(value >= 0, f"{name}={value} must not be negative", place)
        for name in ("clip_norm", "eps", "max_skipped_in_a_row"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be positive", place)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses and the balancing speed (report sections 2.1.2, 2.2 and 4.2).

    `mtp_weight` (lambda) holds until `mtp_switch_tokens`, then `mtp_weight_final`;
    `bias_update_speed` (gamma) holds until `bias_update_tokens`, then 0;
    `balance_weight` (alpha) weighs the sequence-wise balance loss.
    """

    mtp_weight: float = 0.3
    mtp_weight_final: float = 0.1
    mtp_switch_tokens: int = 10_000_000_000_000
    balance_weight: float = 1e-4
    bias_update_speed: float = 1e-3
    bias_update_tokens: int = 14_300_000_000_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            sound = 0 <= value < math.inf
            require(sound, f"{field.name}={value} must be finite and not negative", "LossConfig")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written (asynchronously) and how many stay, plus the best one."""

    every_steps: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be positive", "CheckpointConfig")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation during training and the sample at its end."""

    every_steps: int = 1000
    sequences: int = 64
    final_sequences: int = 512
    prompt: str = "def "
    sample_tokens: int = 128
    temperature: float = 0.8

    def __post_init__(self) -> None:
        place = "EvaluationConfig"
        for name in ("every_steps", "sequences", "final_sequences", "sample_tokens"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be positive", place)
        require(
            self.temperature >= 0, f"temperature={self.temperature} must not be negative", place
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run. It ends after `total_tokens`, or after `steps` steps if that is less.

    `steps` does not move any schedule: a run stopped early and resumed is the run never stopped.
    `init_from`: where a new run's weights and expert biases come from: a Hugging Face folder, one
    that `convert.py from-hf` made, or a run (its newest checkpoint); null is at random.
    `init_missing_mtp`: begin MTP modules that those weights lack at random, instead of refusing.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    total_tokens: int = 14_800_000_000_000
    steps: int | None = None
    seed: int = 0
    init_from: str | None = None
    init_missing_mtp: bool = False

    def __post_init__(self) -> None:
        place = "TrainConfig"
        require(self.total_tokens > 0, f"total_tokens={self.total_tokens} must be > 0", place)
        require(self.steps is None or self.steps > 0, f"steps={self.steps} must be positive", place)
        require(
            self.init_from is not None or not self.init_missing_mtp,
            "init_missing_mtp=True must come with init_from",
            place,
        )
        require(
            self.total_tokens / self.data.sequence_length < 2**32,
            f"total_tokens={self.total_tokens} over sequence_length={self.data.sequence_length} "
            "must stay below 2**32 sequences, the range of the sequence counter",
            place,
        )
        require(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"sequence_length={self.data.sequence_length} must be at most "
            f"max_position_embeddings={self.model.max_position_embeddings}",
            place,
        )
        require(
            self.model.num_nextn_predict_layers < self.data.sequence_length - 1,
            f"num_nextn_predict_layers={self.model.num_nextn_predict_layers} must be below "
            f"sequence_length={self.data.sequence_length} - 1",
            place,
        )
