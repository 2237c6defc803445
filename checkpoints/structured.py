"""Structured skills: extraction to JSON under a schema, and calling a tool; the one right answer is computed with the question.

Life of the data: a domain (person, order, ...) makes up values, writes them into sentences, and asks for some of them under a JSON
schema; a tool makes up arguments and a request that needs them. What this file does NOT know: tokens and the chat template's text.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpoints import words
from checkpoints.skills import Exchange, Message, Skill

Maker = Callable[[random.Random], Any]
HOBBIES = ["reading", "chess", "swimming", "painting", "running", "cooking", "singing", "fishing", "dancing", "gardening", "hiking"]
JOBS = ["teacher", "doctor", "nurse", "cook", "farmer", "baker", "pilot", "driver", "writer", "painter", "lawyer", "singer", "engineer"]
LANGUAGES = ["French", "German", "Spanish", "Italian", "Greek", "Polish", "Danish", "Japanese", "Turkish", "Dutch"]


def _number(low: int, high: int) -> Maker:
    """A maker of integers from `low` to `high`."""
    return lambda rng: rng.randint(low, high)


def _one_of(values: list[str]) -> Maker:
    """A maker of one of `values`."""
    return lambda rng: rng.choice(values)


def _price(rng: random.Random) -> float:
    """An amount with one or two decimals, never a whole number."""
    return rng.randrange(100) + rng.choice((0.5, 0.25, 0.75, 0.99, 0.2, 0.9))


def _email(rng: random.Random) -> str:
    """An e-mail address in lower case."""
    return f"{words.person(rng).split()[0].lower()}@{rng.choice(('example.com', 'mail.com', 'post.org'))}"


def _date(rng: random.Random) -> str:
    """A day of a year as 'May 4'."""
    return f"{rng.choice(words.MONTHS)} {rng.randint(1, 28)}"


def _title(rng: random.Random) -> str:
    """A title such as 'The Old River'."""
    return f"The {rng.choice(words.ADJECTIVES).capitalize()} {rng.choice(words.NOUNS).capitalize()}"


def _hobbies(rng: random.Random) -> list[str]:
    """One to three hobbies."""
    return rng.sample(HOBBIES, rng.randint(1, 3))


def _thing(rng: random.Random) -> str:
    """A noun with or without an adjective."""
    return f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}" if rng.random() < 0.3 else words.any_word(rng)


@dataclass(frozen=True)
class Field:
    """One property of a schema: JSON type, a maker of values and sentences that state a value ({v}) of a subject ({s})."""

    name: str
    type: str
    make: Maker
    sentences: tuple[str, ...]


def _field(name: str, kind: str, make: Maker, *sentences: str) -> Field:
    """A Field from its sentences."""
    return Field(name, kind, make, sentences)


DOMAINS: dict[str, tuple[Field, ...]] = {
    "person": (
        _field("name", "string", words.person, "My name is {v}.", "This is {v}.", "I met {v}.", "Here is {v}."),
        _field("age", "integer", _number(1, 99), "{s} is {v} years old.", "{s} turned {v} this year.", "{s} is {v}.", "Age {v}."),
        _field("city", "string", words.city, "{s} lives in {v}.", "{s} comes from {v}.", "{s} moved to {v} last year."),
        _field("job", "string", _one_of(JOBS), "{s} works as a {v}.", "{s} is a {v}.", "The job is {v}."),
        _field("email", "string", _email, "Write to {v}.", "The address is {v}.", "You can reach {s} at {v}."),
        _field("hobbies", "array", _hobbies, "{s} likes {v}.", "{s} enjoys {v}."),
        _field("member", "boolean", lambda rng: rng.random() < 0.5, "{s} is {v} a member.", "{s} has {v} joined the club."),
        _field("phone", "string", lambda rng: f"555-{rng.randrange(10000):04d}", "The phone number is {v}.", "Call {v}."),
    ),
    "order": (
        _field("customer", "string", words.person, "The customer is {v}.", "The order is from {v}.", "{v} wrote to us."),
        _field("item", "string", _thing, "They want a {v}.", "They bought the {v}.", "The item is a {v}."),
        _field("quantity", "integer", _number(1, 50), "They need {v} of them.", "The quantity is {v}.", "We send {v} pieces."),
        _field("price", "number", _price, "It costs {v} dollars.", "The price is {v}.", "They pay ${v}."),
        _field("city", "string", words.city, "Send it to {v}.", "It goes to {v}.", "The shop is in {v}."),
        _field("paid", "boolean", lambda rng: rng.random() < 0.5, "It is {v} paid.", "The bill is {v} settled."),
    ),
    "event": (
        _field("title", "string", _title, 'The event is called "{v}".', 'Come to "{v}"!', 'We will see "{v}".'),
        _field("date", "string", _date, "It is on {v}.", "The date is {v}.", "We meet on {v}."),
        _field("place", "string", words.city, "It takes place in {v}.", "We meet in {v}.", "The place is {v}."),
        _field("guests", "integer", _number(2, 300), "There will be {v} guests.", "{v} people are coming.", "We expect {v} guests."),
        _field("host", "string", words.person, "The host is {v}.", "{v} invites you.", "It is organized by {v}."),
    ),
    "book": (
        _field("title", "string", _title, 'I read "{v}".', 'The book is called "{v}".', 'The title is "{v}".'),
        _field("author", "string", words.person, "It was written by {v}.", "The author is {v}.", "{v} wrote it."),
        _field("year", "integer", _number(1800, 2025), "It came out in {v}.", "It is from {v}.", "It was printed in {v}."),
        _field("pages", "integer", _number(20, 900), "It has {v} pages.", "It is {v} pages long."),
        _field("price", "number", _price, "It costs {v} dollars.", "The price is {v}."),
    ),
    "pet": (
        _field("name", "string", words.person, "Our pet is called {v}.", "The name is {v}.", "Meet {v}!"),
        _field("species", "string", _one_of(list(words.YOUNG)), "{s} is a {v}.", "It is a {v}.", "{s} is a very nice {v}."),
        _field("age", "integer", _number(1, 20), "{s} is {v} years old.", "It is {v} years old."),
        _field("color", "string", _one_of(["black", "white", "brown", "gray", "red", "yellow"]), "{s} is {v}.", "The color is {v}."),
        _field("owner", "string", words.person, "{s} belongs to {v}.", "The owner is {v}.", "{v} owns {s}."),
    ),
    "trip": (
        _field("origin", "string", words.city, "The train leaves from {v}.", "We start in {v}.", "It departs from {v}."),
        _field("destination", "string", words.city, "It goes to {v}.", "The destination is {v}.", "We arrive in {v}."),
        _field("date", "string", _date, "We leave on {v}.", "The date is {v}.", "It runs on {v}."),
        _field("seats", "integer", _number(1, 9), "We need {v} seats.", "Please book {v} seats.", "There are {v} seats left."),
        _field("price", "number", _price, "A ticket costs {v} dollars.", "The price is {v}."),
    ),
}  # fmt: skip


def _spoken(field: Field, value: Any) -> str:
    """The value as a sentence says it: lists with 'and', truth as 'indeed' or 'not'."""
    if field.type == "boolean":
        return "indeed" if value else "not"
    if field.type == "array":
        return value[0] if len(value) == 1 else ", ".join(value[:-1]) + " and " + value[-1]
    return str(value)


def _describe(rng: random.Random, fields: list[Field], values: dict[str, Any]) -> str:
    """A few sentences, or lines of 'Field: value', that state every value."""
    if rng.random() < 0.2 and not any(field.type in ("boolean", "array") for field in fields):
        return "\n".join(f"{field.name.capitalize()}: {values[field.name]}" for field in fields)
    first, *rest = fields
    subject = str(values[first.name]).split()[0] if first.name == "name" else "It"
    rng.shuffle(rest)
    sentences = [rng.choice(field.sentences).format(v=_spoken(field, values[field.name]), s=subject) for field in (first, *rest)]
    return " ".join(sentences)


def schema_of(fields: list[Field]) -> dict[str, Any]:
    """The JSON schema of an object with exactly these fields."""
    properties: dict[str, Any] = {field.name: {"type": field.type} for field in fields}
    for field in fields:
        if field.type == "array":
            properties[field.name]["items"] = {"type": "string"}
    return {"type": "object", "properties": properties, "required": [field.name for field in fields]}


def json_extraction(rng: random.Random) -> Exchange:
    """Fill a JSON object under a schema (or named keys) from a short text; the answer is the JSON alone, keys in the schema's order."""
    domain = DOMAINS[rng.choice(list(DOMAINS))]
    told = [domain[0], *rng.sample(domain[1:], rng.randint(1, min(4, len(domain) - 1)))]
    values = {field.name: field.make(rng) for field in told}
    asked = rng.sample(told, rng.randint(1, len(told))) if rng.random() < 0.5 else told
    text = _describe(rng, list(told), values)
    answer = json.dumps({field.name: values[field.name] for field in asked}, ensure_ascii=False)
    schema, names = json.dumps(schema_of(asked)), [field.name for field in asked]
    keys = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    forms = (
        ("", f"Extract the data as JSON with this schema: {schema}\n\n{text}"),
        ("", f"{text}\n\nAnswer with JSON that matches this schema: {schema}"),
        ("", f"Text: {text}\nSchema: {schema}\nJSON:"),
        (f"Answer only with JSON that matches this schema: {schema}", text),
        (f"You extract data. Reply with a JSON object for this schema:\n{schema}", f"Extract the data: {text}"),
        ("", f"Extract {keys} as JSON: {text}"),
        ("", f"{text}\n\nGive me the {keys} as JSON."),
    )
    system, user = rng.choice(forms)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return Exchange(tuple(messages), f"extract {answer}")


@dataclass(frozen=True)
class Tool:
    """One callable function: its parameters (name -> (JSON type, maker)), requests that need it, a result and what to say about it."""

    name: str
    description: str
    parameters: dict[str, tuple[str, Maker]]
    requests: tuple[str, ...]
    result: str
    make_result: Maker
    reply: str

    def spec(self) -> dict[str, Any]:
        """The function as the chat request names it."""
        properties = {name: {"type": kind} for name, (kind, _) in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}


WEATHER, DONE = _one_of(["sunny", "rainy", "cloudy", "windy", "snowy", "foggy"]), _one_of(["done", "ok"])
TOOLS: tuple[Tool, ...] = (
    Tool("get_weather", "Get the current weather in a city", {"city": ("string", words.city)},
         ("What is the weather in {city}?", "How is the weather in {city}?", "What's the weather like in {city} today?",
          "Tell me the weather in {city}.", "Is it raining in {city}?"), "weather", WEATHER, "It is {r} in {city}."),
    Tool("get_temperature", "Get the temperature of a city in degrees", {"city": ("string", words.city)},
         ("How warm is it in {city}?", "What is the temperature in {city}?", "How cold is it in {city} now?"),
         "degrees", _number(-15, 39), "It is {r} degrees in {city}."),
    Tool("get_time", "Get the local time of a city", {"city": ("string", words.city)},
         ("What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?"),
         "time", lambda rng: f"{rng.randrange(24):02d}:{rng.randrange(60):02d}", "It is {r} in {city}."),
    Tool("calculate", "Multiply two numbers", {"a": ("integer", _number(11, 999)), "b": ("integer", _number(11, 999))},
         ("What is {a} * {b}?", "Multiply {a} by {b}.", "Calculate {a} times {b}."), "result", _number(121, 99999), "The result is {r}."),
    Tool("set_timer", "Set a timer for some minutes", {"minutes": ("integer", _number(1, 90))},
         ("Set a timer for {minutes} minutes.", "Remind me in {minutes} minutes.", "Wake me in {minutes} minutes."),
         "status", DONE, "The timer is set for {minutes} minutes."),
    Tool("send_message", "Send a message to a person", {"to": ("string", words.person), "text": ("string", _thing)},
         ('Send {to} the message "{text}".', 'Write "{text}" to {to}.', 'Tell {to} "{text}".'),
         "status", DONE, "I sent the message to {to}."),
    Tool("search", "Search the library for a topic", {"query": ("string", _thing)},
         ("Search for {query}.", "Find something about {query}.", "Look up {query}."),
         "hits", _number(0, 40), "I found {r} results for {query}."),
    Tool("translate", "Translate a word into a language", {"word": ("string", words.any_word), "language": ("string", _one_of(LANGUAGES))},
         ('Translate "{word}" into {language}.', "What is {word} in {language}?", "How do you say {word} in {language}?"),
         "translation", words.made_up_word, 'It is "{r}" in {language}.'),
    Tool("convert_currency", "Convert an amount of dollars to another currency",
         {"amount": ("integer", _number(1, 900)), "currency": ("string", _one_of(["euros", "pounds", "yen", "pesos", "francs"]))},
         ("How much is {amount} dollars in {currency}?", "Convert {amount} dollars to {currency}."),
         "amount", _number(1, 900), "{amount} dollars are {r} {currency}."),
    Tool("play_music", "Play a song", {"title": ("string", _title)},
         ('Play "{title}".', 'Please play the song "{title}".', 'I want to hear "{title}".'), "status", DONE, 'Now playing "{title}".'),
    Tool("roll_dice", "Roll a die with some sides", {"sides": ("integer", _number(4, 100))},
         ("Roll a die with {sides} sides.", "Throw a {sides}-sided die."), "value", _number(1, 4), "I rolled a {r}."),
    Tool("book_table", "Book a table in a restaurant", {"city": ("string", words.city), "people": ("integer", _number(1, 12))},
         ("Book a table for {people} people in {city}.", "I need a table in {city} for {people}."),
         "status", DONE, "I booked a table for {people} in {city}."),
)  # fmt: skip


def made_up_tool(rng: random.Random) -> Tool:
    """A lookup tool with a made-up name, so that names and parameters must be read from the prompt."""
    attribute = rng.choice(["price", "color", "size", "owner", "weight", "age", "status", "location"])
    noun = words.any_word(rng)
    verb, parameter = rng.choice(["get", "find", "lookup", "fetch"]), rng.choice(["name", "id", noun, "key"])
    kind, make = ("integer", _number(1, 9999)) if parameter == "id" else ("string", words.made_up_word)
    requests = (f"What is the {attribute} of the {noun} {{{parameter}}}?", f"Find the {attribute} of {noun} {{{parameter}}}.")
    reply = f"The {attribute} of {{{parameter}}} is {{r}}."
    description = f"Get the {attribute} of a {noun}"
    return Tool(f"{verb}_{noun}_{attribute}", description, {parameter: (kind, make)}, requests, attribute, words.any_word, reply)


def described(rng: random.Random, spec: dict[str, Any]) -> dict[str, Any]:
    """The spec, half of the time with a description for every parameter, as real clients send them."""
    if rng.random() < 0.5:
        for name, prop in spec["function"]["parameters"]["properties"].items():
            prop["description"] = f"The {name}"
    return spec


def call_of(rng: random.Random, tool: Tool, others: list[Tool]) -> tuple[dict[str, Any], Exchange]:
    """Arguments for `tool`, and the exchange from the request to the call, with `others` on offer too."""
    offered = [tool, *others]
    rng.shuffle(offered)
    arguments = {name: make(rng) for name, (_, make) in tool.parameters.items()}
    request = rng.choice(tool.requests).format(**arguments)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": tool.name, "arguments": arguments}]}
    specs = tuple(described(rng, other.spec()) for other in offered)
    return arguments, Exchange(({"role": "user", "content": request}, call), f"call {request}", specs)


def _call(rng: random.Random) -> tuple[Tool, dict[str, Any], Exchange]:
    """A tool, its arguments, and the exchange from the request to the call, with up to three tools on offer."""
    tool = made_up_tool(rng) if rng.random() < 0.35 else rng.choice(TOOLS)
    others = [other for other in (*rng.sample(TOOLS, 2), made_up_tool(rng)) if other.name != tool.name]
    return tool, *call_of(rng, tool, rng.sample(others, rng.choice((0, 0, 1, 1, 2))))


def tool_call(rng: random.Random) -> Exchange:
    """A request and the call of the right tool with the right arguments."""
    return _call(rng)[2]


def tool_answer(rng: random.Random) -> Exchange:
    """A request, the call, the tool's JSON result and the sentence that reports it."""
    tool, arguments, exchange = _call(rng)
    result = tool.make_result(rng)
    answer = tool.reply.format(r=result, **arguments)
    shown = {"role": "tool", "content": json.dumps({tool.result: result})}
    messages = (*exchange.messages, shown, {"role": "assistant", "content": answer})
    return Exchange(messages, exchange.key, exchange.tools)


STRUCTURED_SKILLS: dict[str, tuple[Skill, float]] = {
    "json_extraction": (json_extraction, 2.2),
    "tool_call": (tool_call, 1.8),
    "tool_answer": (tool_answer, 0.8),
}
