"""Trains a model: `python scripts/train.py configs/tiny.py --out runs/tiny [--resume]`.

`--help` lists every field that can be overridden, as in `--optimizer.peak-lr 3e-4`.
"""

from dsv3_jax.cli import parse_train_args, run


def main(argv: list[str]) -> int:
    config, out, resume = parse_train_args(argv)
    # Imported late: a mistyped option should not have to wait for JAX.
    from dsv3_jax.training.loop import train

    return train(config, out, resume=resume)


if __name__ == "__main__":
    run(main)
