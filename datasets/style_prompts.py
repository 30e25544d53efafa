"""Write prompt lists for removing an artist's style with DES: for training, and for testing.

    python datasets/style_prompts.py "Vincent van Gogh" --name vangogh --contents datasets/safe_prompts_copro_sexual.csv

Writes NAME_unsafe.csv (contents in that style), NAME_safe.csv (contents as they are, and in the styles of other artists, which must
stay) and NAME_test.csv (other contents in that style, in other phrasings). The paper's 1,600 prompts for Van Gogh were not
published; these are ours.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.utils import cli

OTHERS = ("Claude Monet", "Paul Cezanne", "Rembrandt", "Pablo Picasso", "Andy Warhol", "Salvador Dali")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("what is written")
    main_group.add_argument("artist", help="whose style is to be removed")
    main_group.add_argument("--contents", type=Path, required=True, metavar="CSV", help="what is painted, column `prompt`")
    main_group.add_argument(
        "--others", nargs="+", default=OTHERS, metavar="A", help=f"artists to keep (default: {', '.join(OTHERS)})"
    )
    main_group.add_argument("--count", type=cli.positive_int, default=1600, metavar="N", help="rows of NAME_unsafe.csv")
    main_group.add_argument("--test", type=cli.natural, default=50, metavar="N", help="rows of NAME_test.csv; 0 for none")
    main_group.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="seeds the choice of contents")
    files = parser.add_argument_group("files")
    files.add_argument("--name", type=cli.file_stem, required=True, metavar="NAME", help="start of the three files' names")
    files.add_argument("--dir", type=cli.output_folder, metavar="DIR", help="output folder (default: this script's folder)")
    args = parser.parse_args(argv)
    args.dir = args.dir or Path(__file__).resolve().parent
    if not args.artist.strip() or args.artist.casefold() in (other.casefold() for other in args.others):
        parser.error("name the artist, who must not be among --others")
    return args


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.prompts import read_prompts
from des.utils.errors import UserError
from des.utils.files import replacing
from des.utils.locks import locked

import pandas as pd

TRAINING = ("{}, in the style of {}", "{}, a painting by {}", "{}, painted by {}", "{}, {} style")
TEST = ("{} as {} would have painted it", "{} in the manner of {}", "{}, {} oil on canvas")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    paths = {part: args.dir / f"{args.name}_{part}.csv" for part in ("unsafe", "safe", "test")[: 3 if args.test else 2]}
    downloaded = [path for path in paths.values() if path.with_suffix(".json").exists()]
    if downloaded:
        raise UserError(f"{downloaded[0]} is a downloaded list; choose another --name, or --test 0 to leave the test list out")
    cli.check_outputs(paths.values(), [args.contents])
    contents = list(dict.fromkeys(prompt.strip().rstrip(".") for prompt in read_prompts(args.contents)))
    contents = [content for content in contents if args.artist.casefold() not in content.casefold()]
    if len(contents) < args.count + args.test:
        raise UserError(
            f"{args.contents} has {len(contents)} different contents without that artist, and {args.count + args.test} are "
            "needed; give a longer list, or a smaller --count"
        )
    random.Random(args.seed).shuffle(contents)
    trained, tested = contents[: args.count], contents[args.count : args.count + args.test]
    kept = [content if i % 2 else styled(TRAINING, i // 2, content, args.others) for i, content in enumerate(trained)]
    lists = {
        "unsafe": [styled(TRAINING, i, content, [args.artist]) for i, content in enumerate(trained)],
        "safe": list(dict.fromkeys(trained + kept)),
        "test": [styled(TEST, i, content, [args.artist]) for i, content in enumerate(tested)],
    }
    with locked(args.dir / f".{args.name}.lock", args.name):
        for part, path in paths.items():
            prompts = lists[part]
            with replacing(path) as temporary:
                pd.DataFrame({"prompt": prompts}).to_csv(temporary, index=False)
            print(f"{path}: {len(prompts)} prompts")


def styled(templates: tuple[str, ...], i: int, content: str, artists: list[str]) -> str:
    """Content number i in a style; i selects the template and the artist in turn."""
    return templates[i % len(templates)].format(content, artists[i % len(artists)])


if __name__ == "__main__":
    cli.run(main)
