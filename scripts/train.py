"""Trains a model: `python scripts/train.py configs/tiny.py --out runs/tiny [--resume]`.

`--help` lists every field that can be overridden, as in `--optimizer.peak-lr 3e-4`. With
`--init-from PATH` a new run starts from weights: see docs/weights.md. On several hosts the same
command starts on each of them: see docs/pods.md.
"""

import dataclasses

from dsv3_jax.cli import parse_train_args, run


def main(argv: list[str]) -> int:
    config, out, resume = parse_train_args(argv)
    # Imported late: a mistyped option should not have to wait for JAX.
    from dsv3_jax.parallel.cluster import join
    from dsv3_jax.training.loop import train

    facts = dataclasses.asdict(config) | {"--out": str(out), "--resume": resume}
    facts.pop("cluster")  # each process has its own index
    with join(config.cluster, facts) as cluster:
        return train(config, out, resume=resume, cluster=cluster)


if __name__ == "__main__":
    run(main)
