"""Drills: tool calls for training only, in which nothing about a tool can be guessed and its name must be read from the prompt.

Life of the data: a verb, a noun and attributes, each often made up -> a tool and close neighbours of it that differ in one piece of the
name -> a request -> the call. The instances graded in `evaluation` are `structured.tool_call`'s; this file knows nothing of them.
"""

import random
from dataclasses import replace

from checkpoints import words
from checkpoints.skills import Exchange, Skill
from checkpoints.structured import TOOLS, Maker, Tool, call_of, made_up_tool

VERBS = """
get find lookup fetch read load list check show query retrieve compute create delete update set add remove open close start stop book order
cancel rename move copy print export import sync count measure send request search select pick report describe inspect track scan test use
ask call compare estimate fill grab keep log make match name note pull push rate resolve save see store take tell view watch write
""".split()
ATTRIBUTES = """
price color size owner weight age status location height width speed name date code type level rank score cost value label length city place
shape taste smell sound origin maker title year number address country state power depth volume team group version season grade model amount
""".split()
ASKS = (
    "What is the {attribute} of the {noun} {value}?", "Find the {attribute} of {noun} {value}.", "{attribute} of {noun} {value}?",
    "Tell me the {attribute} of {noun} {value}.", "I need the {attribute} of the {noun} {value}.",
    "Look up the {attribute} of the {noun} {value}.", "Please get me the {attribute} of {noun} {value}.",
    "Do you know the {attribute} of the {noun} {value}?",
)  # fmt: skip
ACTS = (
    "Please {verb} the {noun} {value}.", "{verb} {noun} {value}", "Can you {verb} the {noun} {value}?",
    "I want you to {verb} {noun} {value}.",
)  # fmt: skip


def _noun(rng: random.Random) -> str:
    """A noun, rather often a made-up one."""
    return words.made_up_word(rng) if rng.random() < 0.3 else words.any_word(rng)


def _verb(rng: random.Random) -> str:
    """One of the usual four of a lookup, any verb, or a made-up one."""
    chance = rng.random()
    if chance < 0.4:
        return rng.choice(VERBS[:4])
    return rng.choice(VERBS) if chance < 0.85 else words.made_up_word(rng)


def _joined(style: int, *pieces: str) -> str:
    """The pieces as snake_case (styles 0 to 5), camelCase or kebab-case."""
    if style == 6:
        return pieces[0] + "".join(piece.capitalize() for piece in pieces[1:])
    return ("-" if style == 7 else "_").join(pieces)


def _value(rng: random.Random) -> Maker:
    """A maker of a made-up word, a name in capitals, two words, a code, or a person."""
    makers: tuple[Maker, ...] = (
        words.made_up_word,
        words.made_up_word,
        words.made_up_word,
        lambda rng: words.made_up_word(rng).capitalize(),
        lambda rng: f"{words.made_up_word(rng)} {words.any_word(rng)}",
        lambda rng: f"{words.made_up_word(rng)}-{rng.randrange(100)}",
        words.person,
        words.any_word,
    )
    return rng.choice(makers)


def _tool(rng: random.Random, verb: str, noun: str, attribute: str) -> Tool:
    """A tool for one attribute of one noun, or for an act on the noun; its parameters have names of one to three pieces."""
    style = rng.randrange(8)
    names = {"name", "id", "key", noun, f"{noun}_{rng.choice(('name', 'id', 'key'))}", _noun(rng), f"{_noun(rng)}_{_noun(rng)}", "value"}
    names |= {_joined(style, rng.choice(ATTRIBUTES), "of", noun)} if rng.random() < 0.3 else set()
    chosen = rng.sample(sorted(names), rng.choice((1, 1, 1, 2, 2, 3)))
    parameters: dict[str, tuple[str, Maker]] = {}
    value = ""
    for i, name in enumerate(chosen):
        whole = name.endswith("id") or rng.random() < 0.1
        parameters[name] = ("integer", lambda rng: rng.randint(1, 9999)) if whole else ("string", _value(rng))
        value += f"{{{name}}}" if i == 0 else f" with {name.replace('_', ' ')} {{{name}}}"
    asked = rng.random() < 0.75
    templates = ASKS if asked else ACTS
    requests = tuple(text.format(verb=verb, noun=noun, attribute=attribute, value=value) for text in templates)
    pieces = (verb, noun, attribute) if asked else (verb, noun)
    description = f"Get the {attribute} of a {noun}" if asked else f"{verb.capitalize()} a {noun}"
    reply = f"The {attribute} is {{r}}."
    return Tool(_joined(style, *pieces), description, parameters, requests, attribute, words.any_word, reply)


def tool_drill(rng: random.Random) -> Exchange:
    """A call among up to four tools whose names share pieces."""
    verb, noun, attribute = _verb(rng), _noun(rng), rng.choice(ATTRIBUTES)
    tool = _tool(rng, verb, noun, attribute)
    others: list[Tool] = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        kind = rng.randrange(4)
        if kind == 0:
            others.append(_tool(rng, _verb(rng), _noun(rng), attribute))
        elif kind == 1:
            others.append(_tool(rng, _verb(rng), noun, rng.choice([other for other in ATTRIBUTES if other != attribute])))
        else:
            others.append(_tool(rng, _verb(rng), _noun(rng), rng.choice(ATTRIBUTES)))
    return _distinct(rng, tool, others)


def lookup_drill(rng: random.Random) -> Exchange:
    """A lookup as `structured` makes it up, among one to three more lookups and a tool that is named in training."""
    tool = made_up_tool(rng)
    others = [made_up_tool(rng) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    if rng.random() < 0.4:
        others.append(rng.choice(TOOLS))
    return _distinct(rng, tool, others)


def _distinct(rng: random.Random, tool: Tool, others: list[Tool]) -> Exchange:
    """The call of `tool`; another tool that would answer the same request is left out."""
    described = {tool.description.lower()}
    kept = [other for other in others if other.name != tool.name and other.description.lower() not in described]
    ordered = replace(tool, requests=tuple(dict.fromkeys(tool.requests)))
    return call_of(rng, ordered, kept)[1]


DRILLS: dict[str, tuple[Skill, float]] = {"tool_drill": (tool_drill, 1.0), "lookup_drill": (lookup_drill, 1.0)}
