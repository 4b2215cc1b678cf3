"""Weights in and out: `convert.py from-hf SRC DST`, `to-hf SRC DST [--fp8]`, `inspect PATH`.

from-hf turns a Hugging Face folder (BF16 or FP8) into a checkpoint that any mesh restores, to-hf a
checkpoint into a Hugging Face folder, both in bounded memory and with a ledger of every tensor.
"""

import logging
import os

from dsv3_jax.cli import OneLineParser, run


def main(argv: list[str]) -> None:
    parser = OneLineParser(prog="convert.py", description="Weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    into = commands.add_parser("from-hf", help="a Hugging Face folder to a checkpoint")
    into.add_argument("source", metavar="SRC", help="config.json and safetensors")
    into.add_argument("destination", metavar="DST", help="a new folder")
    into.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    into.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf weights")
    out = commands.add_parser("to-hf", help="a checkpoint to a Hugging Face folder")
    out.add_argument("source", metavar="SRC", help="a converted folder, a run, or a HF folder")
    out.add_argument("destination", metavar="DST", help="a new folder")
    out.add_argument("--fp8", action="store_true", help="the linears in FP8, as released")
    out.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf weights")
    out.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="as in 5GB, 500MB")
    look = commands.add_parser("inspect", help="what a folder or checkpoint holds")
    look.add_argument("path", metavar="PATH")
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    # Nothing here needs an accelerator, and another process may hold it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("pallas_kernels").setLevel(logging.WARNING)  # shapes only: no kernel runs
    # Imported late: a mistyped option should not have to wait for JAX.
    if command == "from-hf":
        from dsv3_jax.checkpoints.from_hf import from_hf

        print(from_hf(options.pop("source"), options.pop("destination"), **options))
    elif command == "to-hf":
        from dsv3_jax.checkpoints.to_hf import to_hf

        print(to_hf(options.pop("source"), options.pop("destination"), **options))
    else:
        from dsv3_jax.checkpoints.inspect import describe

        print(describe(options["path"]))


if __name__ == "__main__":
    run(main)
