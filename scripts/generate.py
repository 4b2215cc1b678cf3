"""Completes a text: `python scripts/generate.py runs/tiny --prompt "def "`.

MODEL is the directory of a training run, or a Hugging Face folder (config.json, safetensors).
"""

from dsv3_jax.cli import OneLineParser, run


def main(argv: list[str]) -> None:
    parser = OneLineParser(prog="generate.py", description="Completes a text.")
    parser.add_argument("model", metavar="MODEL", help="a training run or a Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus to draw from, in (0, 1]")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    options = vars(parser.parse_args(argv))
    path, prompt = options.pop("model"), options.pop("prompt")
    # Imported late: a mistyped option should not have to wait for JAX.
    from dsv3_jax.inference.generate import generate_text

    print(prompt + generate_text(path, prompt, **options))


if __name__ == "__main__":
    run(main)
