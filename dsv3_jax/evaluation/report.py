"""What a person sees at the end of a run: scores beside a baseline, two plots and a sample."""

import json
from pathlib import Path

import numpy as np

from dsv3_jax.config import TrainConfig
from dsv3_jax.data.pipeline import TrainingData
from dsv3_jax.evaluation.bigram import BigramModel
from dsv3_jax.evaluation.perplexity import HeldOutResult, evaluate
from dsv3_jax.inference.generate import complete
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.metrics import EVALUATION_FILE, METRICS_FILE, read_jsonl
from dsv3_jax.training.plots import plot_expert_load, plot_loss


def _layer_names(config: TrainConfig) -> list[str]:
    model = config.model
    moe = [f"layer {n}" for n in range(model.num_dense_layers, model.num_hidden_layers)]
    return moe + [f"MTP {k + 1}" for k in range(model.num_nextn_predict_layers)]


def _summary(
    result: HeldOutResult, bigram_loss: float, bytes_per_token: float
) -> dict[str, float | int | None]:
    return {
        "held_out_tokens": result.tokens,
        "held_out_loss": result.loss,
        "held_out_perplexity": result.perplexity,
        "held_out_bits_per_byte": result.bits_per_byte,
        "bigram_loss": bigram_loss,
        "bigram_bits_per_byte": bigram_loss / np.log(2) / bytes_per_token,
        "next_token_accuracy": result.accuracy,
        "mtp_second_token_accuracy": result.mtp_accuracy,
        "mtp_acceptance": result.mtp_acceptance,
    }


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f} %"


def write_report(
    model: Transformer, variables: dict, config: TrainConfig, data: TrainingData, out: Path | None
) -> str:
    """Evaluates a trained model and writes its report into `out`.

    `summary.json`, `loss.png`, `expert_load.png` (held-out load, layers by experts) and
    `sample.txt`. The baseline is a smoothed bigram model of all training tokens, scored on the
    same held-out rows. Of several processes all must call it, one with `out`.

    Returns:
      The report as text; "" without `out`.
    """
    rows = data.held_out(config.evaluation.final_sequences)
    byte_lengths = data.tokenizer.byte_lengths
    result = evaluate(model, variables, rows, byte_lengths, batch_size=config.batch.microbatch_size)
    prompt = config.evaluation.prompt
    text = complete(
        model,
        variables,
        data.tokenizer,
        prompt,
        max_new_tokens=config.evaluation.sample_tokens,
        temperature=config.evaluation.temperature,
        seed=config.seed,
    )
    if out is None:
        return ""
    bigram_loss = BigramModel.fit(data.train_tokens, data.tokenizer.vocab_size).loss(rows)
    summary = _summary(result, bigram_loss, float(byte_lengths[rows[:, 1:]].mean()))
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    history = [(row["step"], row["loss"]) for row in read_jsonl(out / EVALUATION_FILE)]
    plot_loss(
        out / METRICS_FILE,
        out / "loss.png",
        baselines={"bigram, held-out": bigram_loss},
        held_out=[(step, loss) for step, loss in history if loss is not None],
    )
    pictures = f"  pictures    {out / 'loss.png'}"
    if result.load.size:
        relative = result.load / result.load.mean(-1, keepdims=True)
        plot_expert_load(relative, out / "expert_load.png", layer_names=_layer_names(config))
        pictures += f", {out / 'expert_load.png'}"

    (out / "sample.txt").write_text(prompt + text, encoding="utf-8")
    return "\n".join(
        [
            f"held-out, {result.tokens:,} tokens: this model beside a smoothed bigram model",
            f"  loss        {result.loss:.4f}   bigram {bigram_loss:.4f}   nats a token",
            f"  bits/byte   {result.bits_per_byte:.4f}   "
            f"bigram {summary['bigram_bits_per_byte']:.4f}",
            f"  perplexity  {result.perplexity:.2f}",
            f"  next token ranked first        {_percent(result.accuracy)}",
            f"  second-next ranked first (MTP) {_percent(result.mtp_accuracy)}",
            f"  MTP agrees with the main model {_percent(result.mtp_acceptance)}",
            pictures,
            f"sample, {out / 'sample.txt'}:",
            prompt + text,
        ]
    )
