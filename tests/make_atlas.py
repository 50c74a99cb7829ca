"""Writes the names in atlas.tsv anew: `pip install babel==2.18.0; python tests/make_atlas.py`.

The names of countries, regions, languages and currencies in four languages, and who speaks and
pays what, are the Unicode CLDR's (its licence: unicode.org/license.txt). Which region holds which
country is the United Nations' M49. That, the sentences and the capitals are written by hand, in
atlas.tsv alone, and stay as they are. Of languages and currencies it has those of countries with
one alone: else another candidate would be right, too.
"""

import csv
from pathlib import Path

from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

LANGS = "en", "fr", "es", "sw"


def code_of(relation: str, country: str, name: str) -> tuple[str, str]:
    """The CLDR's kind and code of a fact; name is its English name."""
    if relation == "of":  # the country's own name
        return "territories", country
    if relation in ("region", "continent"):
        codes = {name: code for code, name in Locale("en").territories.items()}
        return "territories", codes[name]
    if relation == "language":
        (code,) = get_official_languages(country, de_facto=True)
        return "languages", code
    (code,) = get_territory_currencies(country)
    return "currencies", code


def main() -> None:
    path = Path(__file__).parents[1] / "atlas.tsv"
    header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t")
    locales = [Locale(lang) for lang in LANGS]
    lines = [header]
    for relation, country, *names in rows:
        if relation not in ("template", "capital"):
            kind, code = code_of(relation, country, names[0])
            names = [getattr(locale, kind)[code] for locale in locales]
        lines.append([relation, country, *names])
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
