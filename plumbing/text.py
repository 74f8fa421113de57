"""Text: normalising and comparing answers, neutralising outside text, templates, encoding."""

import re
import string
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from plumbing.cli import UserError

ROOT = Path(__file__).resolve().parents[1]


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str | None, golden_answers: list[str]) -> float:
    """1 if the normalised answer equals a normalised golden answer, else 0. No answer: 0."""
    golden = map(normalize_answer, golden_answers)
    return float(answer is not None and normalize_answer(answer) in golden)


def f1_score(answer: str | None, golden_answers: list[str]) -> float:
    """SQuAD's word-level F1 of the normalised strings, for the best golden answer (section 3.4)."""
    if answer is None:
        return 0.0
    return max(word_f1(normalize_answer(answer), normalize_answer(gold)) for gold in golden_answers)


def word_f1(given: str, gold: str) -> float:
    given_words, gold_words = given.split(), gold.split()
    if not given_words or not gold_words:
        return float(given_words == gold_words)
    common = sum((Counter(given_words) & Counter(gold_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given_words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def cover_em(answer: str | None, golden_answers: list[str]) -> float:
    """1 if a normalised golden answer is a substring of the normalised answer, else 0.

    The published code calls this EM. As there, a golden answer that normalises to "" is a substring
    of every answer, and no answer at all (None) scores 0."""
    if answer is None:
        return 0.0
    given = normalize_answer(answer)
    return float(any(gold in given for gold in map(normalize_answer, golden_answers)))


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the normalised text contains one of the normalised answers as whole words."""
    padded = f" {normalize_answer(text)} "
    return any(f" {answer} " in padded for answer in map(normalize_answer, answers) if answer)


def clean(text: str, limit: int | None = None) -> str:
    """One line of valid Unicode, cut to `limit` characters.

    A lone surrogate becomes "?", a control character or a run of white space one space."""
    text = text[:limit].encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


CONTROL_TAG = re.compile(r"<\s*/?\s*(think|search|information|answer)\b[^<>]*>?", re.IGNORECASE)
BRACKETS = str.maketrans("<>[]{}", "()()()")


def neutralize(text: str, tokenizer) -> str:
    """Text from outside without control tags and special tokens: it can't close or open a block.

    `<search>` becomes `(search)`, `<|im_end|>` becomes `(|im_end|)`; otherwise as `clean`."""
    text = CONTROL_TAG.sub(lambda match: match[0].translate(BRACKETS), clean(text))
    for token in tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()):
        broken = token.translate(BRACKETS)
        text = text.replace(token, broken if broken != token else token[:1] + " " + token[1:])
    return text


PROMPTS_FILE = ROOT / "data" / "prompts.toml"
Prompts = dict[str, dict[str, str]]


def load_prompts(path: Path | None = None) -> Prompts:
    """The kit's templates by table and name, replaced by those in `path`. Raises UserError if one
    there is unknown, is no text, or has not the {names} that it needs, or if the file can't be
    read."""
    prompts = tomllib.loads(PROMPTS_FILE.read_text(encoding="utf-8"))
    if path is None:
        return prompts
    try:
        custom = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    for table, entries in custom.items():
        if not isinstance(entries, dict) or table not in prompts:
            raise UserError(f"{path}: {table} is no table of data/prompts.toml: they are "
                            f"{', '.join(f'[{name}]' for name in prompts)}")
        for name, wording in entries.items():
            if name not in prompts[table]:
                raise UserError(f"{path}: the kit has no template {table}.{name}: there are "
                                f"{', '.join(prompts[table])}")
            if not isinstance(wording, str):
                raise UserError(f"{path}: {table}.{name} must be a text")
        check_names(prompts[table], prompts[table] | entries, f"{path}: {table}")
        prompts[table] |= entries
    return prompts


NAME = re.compile(r"\{(\w+)\}")
TOGETHER = ("system", "user", "heading")  # of a simulator: filled in with the same values
QUALITY = {"quality", "Quality", "hint"}


def check_names(kit: dict[str, str], own: dict[str, str], where: str) -> None:
    """Raise UserError if own templates have a {name} that the kit's lack, or lack one they need:
    query (where there is none, question), documents, and for a simulator what tells its quality."""
    groups = [TOGETHER] if "heading" in kit else []
    for group in groups + [(name,) for name in kit if not (groups and name in TOGETHER)]:
        known, found = ({name for part in group for name in NAME.findall(texts[part])}
                        for texts in (kit, own))
        place = f"{where}.{' and '.join(group)}"
        shown = lambda names: ", ".join(f"{{{name}}}" for name in sorted(names))  # noqa: E731
        if unknown := found - known:
            raise UserError(f"{place}: unknown {shown(unknown)}; "
                            f"there are {shown(known) or 'none'}")
        needed = known & ({"query", "documents"} if "query" in known else {"question", "documents"})
        if missing := needed - found:
            raise UserError(f"{place}: lacks {shown(missing)}")
        if known & QUALITY and not found & QUALITY:
            raise UserError(f"{place}: lacks one of {shown(QUALITY)}: useful and noisy documents "
                            "would be asked for in the same words")


def fill(template: str, **values: object) -> str:
    """Replace each {name} in one pass, so that a {name} inside a value stays as it is."""
    template = template.strip(" \n")
    return NAME.sub(lambda match: str(values.get(match[1], match[0])), template)


def prompt_ids(tokenizer, system: str, user: str, start: str = "") -> list[int]:
    """Token ids of a prompt in the chat template; without one, a blank line ends each part.

    An empty part is left out. start: beginning of the reply, which the model continues."""
    parts = {role: content for role, content in (("system", system), ("user", user)) if content}
    if tokenizer.chat_template:
        messages = [{"role": role, "content": content} for role, content in parts.items()]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = (tokenizer.bos_token or "") + "".join(f"{content}\n\n" for content in parts.values())
    return encode(tokenizer, text + start)


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, without special tokens added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
