"""Writes atlas.tsv: `pip install babel==2.18.0; python tests/make_atlas.py`.

The names of countries, regions, languages and currencies in four languages, and who speaks and
pays what, are the Unicode CLDR's (its licence: unicode.org/license.txt). Which region holds which
country is the United Nations' M49, and written here. Capitals are written by hand, in atlas.tsv
alone, and stay as they are.
"""

import csv
from pathlib import Path

from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

REGIONS = {  # M49: region, continent, countries
    "015 002": "DZ EG LY MA SD TN",
    "014 002": "BI KM DJ ER ET KE MG MW MU MZ RW SC SO SS UG TZ ZM ZW",
    "017 002": "AO CM CF TD CG CD GQ GA ST",
    "018 002": "BW SZ LS NA ZA",
    "011 002": "BJ BF CV CI GM GH GN GW LR ML MR NE NG SN SL TG",
    "029 003": "AG BS BB CU DM DO GD HT JM KN LC VC TT",
    "013 003": "BZ CR SV GT HN MX NI PA",
    "021 003": "CA US",
    "005 005": "AR BO BR CL CO EC GY PY PE SR UY VE",
    "143 142": "KZ KG TJ TM UZ",
    "030 142": "CN JP MN KP KR",
    "035 142": "BN KH ID LA MY MM PH SG TH TL VN",
    "034 142": "AF BD BT IN IR MV NP PK LK",
    "145 142": "AM AZ BH CY GE IQ IL JO KW LB OM QA SA SY TR AE YE",
    "151 150": "BY BG CZ HU PL MD RO RU SK UA",
    "154 150": "DK EE FI IS IE LV LT NO SE GB",
    "039 150": "AL AD BA HR GR IT MT ME MK PT SM RS SI ES",
    "155 150": "AT BE FR DE LI LU MC NL CH",
    "053 009": "AU NZ",
    "054 009": "FJ PG SB VU",
    "057 009": "KI MH FM NR PW",
    "061 009": "WS TO TV",
}
LANGS = "en", "fr", "es", "sw"
TEMPLATES = {
    "capital": ("the capital is", "la capitale est", "la capital es", "mji mkuu ni"),
    "region": ("the region is", "la région est", "la región es", "kanda ni"),
    "continent": ("the continent is", "le continent est", "el continente es", "bara ni"),
    "language": (
        "the official language is", "la langue officielle est",
        "el idioma oficial es", "lugha rasmi ni",
    ),
    "currency": ("the currency is", "la monnaie est", "la moneda es", "sarafu ni"),
}  # fmt: skip


def main() -> None:
    path = Path(__file__).parents[1] / "atlas.tsv"
    locales = [Locale(lang) for lang in LANGS]
    table = {}  # {(relation, country): words}

    def add(relation, country, kind, code):
        words = [getattr(locale, kind).get(code) for locale in locales]
        if None in words:
            print(f"{relation} of {country}: {code} has no name in {LANGS[words.index(None)]}")
        else:
            table[relation, country] = words

    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    capitals = {row["country"]: row for row in rows if row["relation"] == "capital"}
    for codes, countries in REGIONS.items():
        region, continent = codes.split()
        for country in countries.split():
            add("of", country, "territories", country)
            add("region", country, "territories", region)
            add("continent", country, "territories", continent)
            official = get_official_languages(country, de_facto=True)
            if len(official) == 1:  # else another candidate would be right, too
                add("language", country, "languages", official[0])
            money = get_territory_currencies(country)
            if len(money) == 1:
                add("currency", country, "currencies", money[0])
            if country in capitals:
                table["capital", country] = [capitals[country][lang] for lang in LANGS]
    rows = [["relation", "country", *LANGS]]
    for relation, words in TEMPLATES.items():
        rows.append(["template", relation, *(f"{{}}: {word}" for word in words)])
    for (relation, country), words in table.items():
        rows.append([relation, country, *words])
    with open(path, "w", encoding="utf-8") as file:
        file.writelines("\t".join(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
