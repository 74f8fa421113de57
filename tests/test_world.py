"""The demo's world: reproducible, well-formed, without leaks between splits, true, searchable."""

import re
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
from helpers import command, data_script, read_lines

from plumbing.text import ROOT

WORLD = ROOT / "data" / "world"
SPLITS = ("train", "dev", "test")
QUESTIONS = {split: read_lines(WORLD / f"{split}.jsonl") for split in SPLITS}
EVERYTHING = [row for split in SPLITS for row in QUESTIONS[split]]
HELD_OUT = QUESTIONS["dev"] + QUESTIONS["test"]
TEXTS = read_lines(WORLD / "passages.jsonl")
PASSAGES = {passage["id"]: passage for passage in TEXTS}
CHAINS = {chain["id"]: chain for chain in read_lines(WORLD / "decompositions.jsonl")}


def plain(text):
    """Lower-case words between blanks, accents removed: ' in the netherlands '."""
    text = unicodedata.normalize("NFKD", text.replace("ı", "i").replace("’", "'").lower())
    text = "".join(ch for ch in text if not unicodedata.combining(ch))
    return f" {' '.join(re.findall(r'[a-z0-9]+', text))} "


def steps_of(row):
    """(relation, subject, step) of each step of a question."""
    chain = CHAINS[row["id"]]
    subjects = [chain["subject"], *(step["golden_answers"][0] for step in chain["steps"][:-1])]
    return zip(chain["relation"].split(">"), subjects, chain["steps"], strict=True)


def facts(relation):
    """Subject -> accepted answers of all steps of one relation."""
    return {subject: step["golden_answers"] for row in EVERYTHING
            for edge, subject, step in steps_of(row) if edge == relation}


def test_build_repeats_the_committed_bytes(tmp_path):
    subprocess.run([sys.executable, ROOT / "data/world.py", "build", "--out", tmp_path], check=True,
                   capture_output=True, env={"PYTHONHASHSEED": "7"})
    names = sorted(path.name for path in WORLD.glob("*.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == names and len(names) == 5
    for name in names:
        assert (tmp_path / name).read_bytes() == (WORLD / name).read_bytes(), name


def test_counts_and_schema():
    assert len(PASSAGES) >= 3000 and len(TEXTS) == len(PASSAGES)
    hops = {split: Counter(row["hops"] for row in QUESTIONS[split]) for split in SPLITS}
    assert hops["dev"] == hops["test"] == {1: 120, 2: 120, 3: 60}
    one, two, three = (hops["train"][n] for n in (1, 2, 3))
    assert one + two + three >= 3000 and one == two == 2 * three
    for row in EVERYTHING:
        assert list(row) == ["id", "question", "golden_answers", "hops"]
        assert 0 < len(set(row["golden_answers"])) == len(row["golden_answers"])
    assert len({plain(row["question"]) for row in EVERYTHING}) == len(EVERYTHING)
    assert [row["id"] for row in EVERYTHING] == list(CHAINS)  # so no id is there twice


def test_passages_are_short_and_name_their_subject():
    assert len({passage["text"] for passage in PASSAGES.values()}) == len(PASSAGES)
    for passage in PASSAGES.values():
        assert list(passage) == ["id", "title", "text"]
        assert 9 <= len(passage["text"].split()) <= 25, passage
        assert plain(passage["title"]) in plain(passage["text"]), passage
        assert not re.search(r"[{}]|\bthe the\b|  |[^.]$", passage["text"]), passage


def test_train_never_mentions_what_dev_and_test_ask_about():
    train = "|".join(
        plain(text) for row in QUESTIONS["train"] for step in CHAINS[row["id"]]["steps"]
        for text in (row["question"], *row["golden_answers"], *step["golden_answers"]))
    held_out = {CHAINS[row["id"]]["subject"] for row in HELD_OUT}
    held_out |= {name for row in HELD_OUT for step in CHAINS[row["id"]]["steps"][:-1]
                 for name in step["golden_answers"]}
    assert len(held_out) > 400
    assert not [name for name in held_out if plain(name) in train]


def test_the_subject_is_all_that_a_question_names():
    """Without its subject a held-out question is made of words of many train questions."""
    common = Counter(word for row in QUESTIONS["train"]
                     for word in set(plain(row["question"]).split()))
    for row in HELD_OUT:
        subject, words = plain(CHAINS[row["id"]]["subject"]), plain(row["question"])
        assert subject in words
        assert all(common[word] >= 5 for word in words.replace(subject, " ").split()), row


def test_steps_lead_to_the_answer_and_each_needs_its_own_search():
    for row in EVERYTHING:
        steps = CHAINS[row["id"]]["steps"]
        assert steps[-1]["golden_answers"] == row["golden_answers"]
        assert len(steps) == len({step["passage"] for step in steps}) == row["hops"]
        earlier = plain(row["question"])
        for _, name, step in steps_of(row):
            query, (answer, *_) = step["query"], step["golden_answers"]
            assert 3 <= len(query.split()) <= 14 and plain(name) in plain(query), step
            text = PASSAGES[step["passage"]]["text"]
            assert answer in text or answer.capitalize() in text, step
            assert not any(plain(alias) in earlier for alias in step["golden_answers"]), row
            earlier += plain(text)


def test_splits_mix_the_relations_alike():
    share = {}
    for split in SPLITS:
        edges = Counter(edge for row in QUESTIONS[split] for edge, *_ in steps_of(row))
        share[split] = {edge: n / edges.total() for edge, n in edges.items()}
        assert max(share[split].values()) < 0.15
        assert all(abs(share[split].get(edge, 0) - part) < 0.03
                   for edge, part in share["train"].items())


def test_country_facts_agree_with_a_second_source():
    """countryinfo tells the same, but for what changed since: currencies, Astana's old name."""
    countryinfo = pytest.importorskip("countryinfo")
    changed = {("country_currency", name) for name in (
        "Belarus", "Croatia", "Mauritania", "Sao Tome and Principe", "Sierra Leone", "Zambia")}
    changed.add(("country_capital", "Kazakhstan"))
    names = {aliases[0]: aliases for edge in ("domain_country", "city_country")
             for aliases in facts(edge).values()}
    for relation, tell in {
        "country_capital": lambda country: [country.capital()],
        "country_currency": lambda country: country.currencies(),
        "country_calling": lambda country: country.calling_codes(),
        "country_domain": lambda country: country.tld(),
        "country_continent": lambda country: [country.region()],
    }.items():
        checked = 0
        for country, answers in facts(relation).items():
            try:
                told = tell(next(map(countryinfo.CountryInfo, names.get(country, [country]))))
            except LookupError:  # it does not know the country by this name
                continue
            accepted = {plain(re.sub("(North|South) America", "Americas", answer))
                        for answer in answers}
            checked += 1
            agrees = accepted & {plain(name) for name in told}
            assert agrees or (relation, country) in changed, (relation, country, told)
        assert checked >= 100, relation


def test_element_facts_agree_with_a_second_source():
    periodictable = pytest.importorskip("periodictable")
    british = {"aluminum": "aluminium", "cesium": "caesium"}
    for told in ("symbol", "number"):
        second = {british.get(element.name, element.name): str(getattr(element, told))
                  for element in periodictable.elements}
        pairs = {(name, answers[0]) for name, answers in facts(f"element_{told}").items()}
        pairs |= {(answers[0], value) for value, answers in facts(f"{told}_element").items()}
        assert len(pairs) >= 50 and pairs <= second.items()


def test_bm25_finds_the_passage_of_every_kind_of_step(capsys):
    command(data_script("world"), "check")
    table = re.findall(r"(\w+) +(\d+) +([01]\.\d{3})", capsys.readouterr().out)
    asked = Counter(edge for row in EVERYTHING for edge, *_ in steps_of(row))
    assert {edge: int(n) for edge, n, _ in table} == asked | {"all": asked.total()}
    assert min(float(recall) for *_, recall in table) >= 0.97


def test_the_scripted_searcher_counts_its_searches_and_takes_other_questions(tmp_path):
    for name, skip in (("first", (0, 0, 0)), ("next", (4, 3, 2))):
        command(data_script("scripted"), "--hops", 4, 3, 2, "--skip", *skip, "--out",
                tmp_path / name)
    first, following = (read_lines(tmp_path / name / "predictions.jsonl")
                        for name in ("first", "next"))
    assert len({record["id"] for record in first + following}) == 18
    thoughts = [turn["text"].split("</think>")[0] for turn in first[-1]["turns"]]
    assert [thought.partition("I need ")[2] for thought in thoughts] == [
        "3 searches. ", "2 searches. ", "1 search. ", "no more. "]
    assert "It is" not in thoughts[0] and all(
        f"It is {turn['target'][0]}." in thought
        for turn, thought in zip(first[-1]["turns"], thoughts[1:]))


def test_the_scripted_searcher_also_asks_in_haste(tmp_path):
    """Hasty searches name what stands before the last hop; their label is that hop, not the end."""
    command(data_script("scripted"), "--hops", 30, 40, 20, "--out", tmp_path / "out")
    whole = read_lines(tmp_path / "out/predictions.jsonl")
    assert Counter(record["hops"] for record in whole) == {1: 30, 2: 40, 3: 20}
    assert all(len(record["turns"]) == record["hops"] + 1 for record in whole)
    assert {record["turns"][-1]["action"] for record in whole} == {"answer"}
    hasty = read_lines(tmp_path / "out/hasty.jsonl")
    assert len(hasty) > 10
    assert {len(CHAINS[record["id"]]["steps"]) for record in hasty} == {2, 3}
    for record in hasty:
        (turn,), chain = record["turns"], CHAINS[record["id"]]
        *before, skipped, last = [step["golden_answers"] for step in chain["steps"]]
        known = plain(before[-1][0] if before else chain["subject"])
        query = plain(turn["query"])
        assert known in query and turn["target"] == skipped != record["golden_answers"]
        assert not any(plain(name) in query for name in skipped + last if plain(name) not in known)
