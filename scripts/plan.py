"""Does a run fit, and what bounds it: `plan.py configs/v3_671b.py --topology v5p:8x8x16`.

Compiles the train step for a TPU slice that need not be there, or with --memory-only, and for
GPUs, computes everything from shapes. Exit code 1: it does not fit.
"""

import logging
import os

from dsv3_jax.cli import OneLineParser, parse_config, run


def main(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="plan.py",
        usage="plan.py CONFIG --topology CHIP:SHAPE [options] [--SECTION.FIELD VALUE ...]",
        description="Does a run fit a cluster, and what bounds its speed.",
        allow_abbrev=False,
    )
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="such as v5p:8x8x16, h100:128")
    parser.add_argument("--memory-only", action="store_true", help="from shapes, without libtpu")
    parser.add_argument("--search", action="store_true", help="rank meshes and remat policies")
    parser.add_argument("--compile", type=int, default=0, metavar="N", help="so many of a search")
    parser.add_argument("--table", action="store_true", help="axes of every parameter, and end")
    options, rest = parser.parse_known_args(argv)
    config = parse_config(rest)
    # Nothing here needs an accelerator, and another process may hold it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    logging.getLogger("pallas_kernels").setLevel(logging.WARNING)  # shapes only: no kernel runs
    # Imported late: a mistyped option should not have to wait for JAX.
    from dsv3_jax.planning.report import report

    text, fits = report(
        config,
        options.topology,
        memory_only=options.memory_only,
        search=options.search,
        compiled=options.compile,
        table=options.table,
    )
    print(text)
    return 0 if fits else 1


if __name__ == "__main__":
    run(main)
