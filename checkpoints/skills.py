"""Generated skills: small tasks whose one right answer is computed, so that training data and evaluation need no outside source.

Life of the data: a skill is a function of a random generator that returns an `Exchange`: messages ending with the right answer. The
exchange's key names the instance; `is_held_out` keeps one instance in twenty for evaluation, so the model is never graded on what it
was trained on. What this file does NOT know: tokens, the chat template's text, the model. Structured skills (JSON, tools) are next door.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoints import words

Message = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """One or more turns that end with the assistant's right answer; `key` names the instance for the split into train and held out."""

    messages: tuple[Message, ...]
    key: str
    tools: tuple[dict[str, Any], ...] = ()


Skill = Callable[[random.Random], Exchange]


def ask(question: str, answer: str, key: str = "") -> Exchange:
    """A user's question and the assistant's answer; the key is the question unless a coarser one is given."""
    return Exchange(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), key or question)


def is_held_out(exchange: Exchange) -> bool:
    """Whether this instance is kept for evaluation (one in twenty, by a hash of its key)."""
    return zlib.crc32(exchange.key.encode()) % 20 == 0


def listed(items: Sequence[object]) -> str:
    """Items joined by a comma and a space."""
    return ", ".join(str(item) for item in items)


def addition(rng: random.Random) -> Exchange:
    """Sums of two numbers below 100; the held-out unit is the unordered pair."""
    a, b = rng.randrange(100), rng.randrange(100)
    name, thing = rng.choice(words.NAMES), rng.choice(words.NOUNS)
    forms = (
        f"What is {a} + {b}?", f"What is {a} plus {b}?", f"{a} + {b}", f"{a}+{b}=", f"Add {a} and {b}.", f"Calculate {a} + {b}.",
        f"How much is {a} + {b}?", f"What is the sum of {a} and {b}?", f"What's {a}+{b}?", f"Compute {a} + {b}.", f"{a} + {b} = ?",
        f"{name} has {a} coins and gets {b} more. How many coins does {name} have now?",
        f"There are {a} people in one {thing} shop and {b} in another. How many people are there in total?",
    )  # fmt: skip
    return ask(rng.choice(forms), str(a + b), f"add {min(a, b)} {max(a, b)}")


def subtraction(rng: random.Random) -> Exchange:
    """Differences of two numbers below 100 that are not negative."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    name = rng.choice(words.NAMES)
    forms = (
        f"What is {a} - {b}?", f"What is {a} minus {b}?", f"{a} - {b}", f"{a}-{b}=", f"Subtract {b} from {a}.", f"Calculate {a} - {b}.",
        f"How much is {a} - {b}?", f"What is the difference between {a} and {b}?", f"What's {a}-{b}?", f"Compute {a} - {b}.",
        f"{name} has {a} coins and gives away {b}. How many coins does {name} have left?",
    )  # fmt: skip
    return ask(rng.choice(forms), str(a - b), f"subtract {a} {b}")


def multiplication(rng: random.Random) -> Exchange:
    """The multiplication table to ten; a table is learned by heart, so what is held out is a wording of a product."""
    a, b = rng.randrange(11), rng.randrange(11)
    forms = (
        f"What is {a} * {b}?", f"What is {a} times {b}?", f"{a} * {b}", f"{a}*{b}=", f"Multiply {a} by {b}.", f"Calculate {a} x {b}.",
        f"How much is {a} times {b}?", f"What is the product of {a} and {b}?", f"What's {a} x {b}?", f"Compute {a} * {b}.",
        f"There are {a} boxes with {b} eggs in each box. How many eggs are there in total?",
    )  # fmt: skip
    return ask(rng.choice(forms), str(a * b))


def counting(rng: random.Random) -> Exchange:
    """Counting up, down or in steps between two numbers below 130."""
    start, length, step = rng.randrange(100), rng.randrange(3, 13), rng.choice((1, 1, 1, 2, 3, 5, 10))
    numbers = list(range(start, start + length * step, step))[:length]
    if rng.random() < 0.3:
        numbers.reverse()
    way = "down " if numbers[0] > numbers[-1] else rng.choice(("", "up "))
    steps = "" if step == 1 else rng.choice((f" in steps of {step}", f" by {step}s"))
    verb = rng.choice(("Count", "Please count", "Can you count"))
    end = "?" if verb.startswith("Can") else "."
    key = f"count {numbers[0]} {numbers[-1]} {step}"
    return ask(f"{verb} {way}from {numbers[0]} to {numbers[-1]}{steps}{end}", listed(numbers), key)


def counting_items(rng: random.Random) -> Exchange:
    """How many items a list has, or how often one word stands in it (up to ten)."""
    items = [words.any_word(rng) for _ in range(rng.randrange(2, 11))]
    if rng.random() < 0.5:
        text = listed(items)
        form = rng.choice((f"How many words are in this list: {text}?", f"Count the items: {text}", f"How many items are here? {text}"))
        return ask(form, str(len(items)))
    word = rng.choice(items)
    items = [word if rng.random() < 0.3 else item for item in items]
    text = listed(items)
    form = rng.choice((f'How many times does "{word}" appear in: {text}?', f'Count the word "{word}": {text}'))
    return ask(form, str(items.count(word)))


def sort_numbers(rng: random.Random) -> Exchange:
    """Sort three to eight numbers below 100, sometimes the largest first."""
    numbers = [rng.randrange(100) for _ in range(rng.randrange(3, 9))]
    text = listed(numbers)
    if rng.random() < 0.25:
        form = rng.choice((f"Sort these numbers from largest to smallest: {text}", f"Sort in descending order: {text}"))
        return ask(form, listed(sorted(numbers, reverse=True)), f"sort {sorted(numbers)}")
    forms = (
        f"Sort these numbers: {text}", f"Sort the numbers {text}.", f"Sort in ascending order: {text}",
        f"Put these numbers in order: {text}", f"Sort from smallest to largest: {text}", f"Please sort {text}.",
    )  # fmt: skip
    return ask(rng.choice(forms), listed(sorted(numbers)), f"sort {sorted(numbers)}")


def sort_words(rng: random.Random) -> Exchange:
    """Sort three to six different nouns by the alphabet."""
    items = rng.sample(words.NOUNS, rng.randrange(3, 7))
    text = listed(items)
    forms = (
        f"Sort these words: {text}", f"Sort these words alphabetically: {text}", f"Put these words in alphabetical order: {text}",
        f"Sort alphabetically: {text}", f"Please sort the words {text}.",
    )  # fmt: skip
    return ask(rng.choice(forms), listed(sorted(items)), f"sort {sorted(items)}")


def sentence(rng: random.Random) -> str:
    """A short sentence of nouns, adjectives and a verb, without a full stop."""
    noun, other = rng.choice(words.NOUNS), rng.choice(words.NOUNS)
    forms = (
        f"the {rng.choice(words.ADJECTIVES)} {noun} {rng.choice(words.VERBS)} the {other}",
        f"{rng.choice(words.NAMES)} {rng.choice(words.VERBS)} a {rng.choice(words.ADJECTIVES)} {noun}",
        f"my {noun} is {rng.choice(words.ADJECTIVES)} and {rng.choice(words.ADJECTIVES)}",
        f"{rng.choice(words.NAMES)} {rng.choice(words.VERBS)} the {noun} and the {other}",
    )
    return rng.choice(forms)


def reverse_words(rng: random.Random) -> Exchange:
    """Say the words of a list (two to eight) or of a short sentence in reverse order."""
    if rng.random() < 0.4:
        text = sentence(rng)
        answer = " ".join(reversed(text.split()))
        forms = (f"Reverse the order of the words: {text}", f"Reverse the words in this sentence: {text}", f"Say this backwards: {text}")
        return ask(rng.choice(forms), answer, f"reverse {text}")
    items = [words.any_word(rng) for _ in range(rng.randrange(2, 9))]
    glue = rng.choice((", ", ", ", " "))
    text = glue.join(items)
    forms = (f"Reverse these words: {text}", f"Reverse the words: {text}", f"Reverse the order of these words: {text}", f"Reverse: {text}")
    return ask(rng.choice(forms), glue.join(reversed(items)), f"reverse {text}")


def reverse_letters(rng: random.Random) -> Exchange:
    """Spell one word, forwards or backwards, letter by letter with hyphens: hard for a model that reads subword tokens."""
    word = words.made_up_word(rng) if rng.random() < 0.25 else rng.choice(words.NOUNS + words.ADJECTIVES)
    if rng.random() < 0.5:
        forms = (f'Spell the word "{word}".', f"Spell {word}.", f"How do you spell {word}?")
        return ask(rng.choice(forms), "-".join(word), f"spell {word}")
    forms = (f'Spell the word "{word}" backwards.', f"Spell {word} backwards.", f'Write the letters of "{word}" in reverse order.')
    return ask(rng.choice(forms), "-".join(reversed(word)), f"backwards {word}")


def copying(rng: random.Random) -> Exchange:
    """Repeat a sentence, a list of words, digits or random characters exactly."""
    choice = rng.randrange(4)
    if choice == 0:
        text = sentence(rng)
        text = text[0].upper() + text[1:] + rng.choice((".", "!", ""))
    elif choice == 1:
        text = rng.choice((" ", ", ")).join(words.any_word(rng) for _ in range(rng.randrange(2, 10)))
    elif choice == 2:
        text = " ".join(str(rng.randrange(10 ** rng.randrange(1, 5))) for _ in range(rng.randrange(1, 7)))
    else:
        text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") for _ in range(rng.randrange(4, 11)))
    forms = (
        f"Repeat after me: {text}", f"Copy this: {text}", f"Copy this text exactly: {text}", f"Say exactly this: {text}",
        f"Repeat: {text}", f'Say "{text}"', f'Write "{text}"', f"Please repeat this: {text}",
    )  # fmt: skip
    return ask(rng.choice(forms), text, f"copy {text}")


def picking(rng: random.Random) -> Exchange:
    """Name the first, second, third, last, largest or smallest item of a list of two-digit numbers or words."""
    if rng.random() < 0.4:
        numbers = rng.sample(range(100), rng.randrange(2, 7))
        kind = rng.choice(("largest", "smallest"))
        answer = max(numbers) if kind == "largest" else min(numbers)
        form = rng.choice((f"Which number is the {kind}: {listed(numbers)}?", f"What is the {kind} of these numbers: {listed(numbers)}?"))
        return ask(form, str(answer))
    items = [words.any_word(rng) for _ in range(rng.randrange(3, 8))]
    kind, answer = rng.choice((("first", items[0]), ("second", items[1]), ("third", items[2]), ("last", items[-1])))
    form = rng.choice((f"What is the {kind} word in this list: {listed(items)}?", f"Which word is {kind}: {listed(items)}?"))
    return ask(form, answer)


def yes_no(rng: random.Random) -> Exchange:
    """Comparison, parity and membership; the answer is Yes or No, about half each."""
    a, b = rng.randrange(100), rng.randrange(100)
    choice = rng.randrange(4)
    if choice == 0:
        word, truth = rng.choice((("greater than", a > b), ("larger than", a > b), ("less than", a < b), ("smaller than", a < b)))
        question, key = f"Is {a} {word} {b}?", f"compare {a} {b}"
    elif choice == 1:
        word, truth = rng.choice((("even", a % 2 == 0), ("odd", a % 2 == 1)))
        question, key = rng.choice((f"Is {a} {word}?", f"Is {a} an {word} number?", f"Is the number {a} {word}?")), f"parity {a} {word}"
    elif choice == 2:
        c = rng.choice((a + b, a + b + rng.choice((-10, -2, -1, 1, 2, 10))))
        truth, question, key = a + b == c, f"Is {a} + {b} equal to {c}?", f"equal {a} {b} {c}"
    else:
        items = [words.any_word(rng) for _ in range(rng.randrange(2, 8))]
        word = rng.choice(items) if rng.random() < 0.5 else words.any_word(rng)
        truth, text = word in items, listed(items)
        question = rng.choice((f"Is {word} in this list: {text}?", f'Does this list contain "{word}"? {text}'))
        key = question
    suffix = rng.choice(("", "", " Answer yes or no."))
    return ask(question + suffix, "Yes." if truth else "No.", key)


def _listed_fact(rng: random.Random, choice: int) -> tuple[list[str], str]:
    """Wordings of one question from the tables and its answer."""
    table, questions = [
        (words.COLORS, ["What color is {}?", "Which color is {}?", "What is the color of {}?"]),
        (words.OPPOSITES, ["What is the opposite of {}?", "Name the opposite of {}.", "What's the opposite of {}?"]),
        (words.YOUNG, ["What is a baby {} called?", "What do you call a young {}?", "What is the young of {a} {} called?"]),
        (words.SOUNDS, ["What sound does {a} {} make?", "What does {a} {} say?"]),
        (words.LEGS, ["How many legs does {} have?", "Tell me, how many legs does {} have?"]),
        (words.SIDES, ["How many sides does {} have?", "Tell me, how many sides does {} have?"]),
        (words.UNITS, ["How many {}?", "Tell me, how many {}?"]),
        (words.OTHER_FACTS, ["{}", "Tell me: {}", "I have a question. {}"]),
    ][choice]
    thing, answer = rng.choice(list(table.items()))
    text = str(answer)
    article = "an" if thing[0] in "aeiou" else "a"
    return [question.format(thing, a=article) for question in questions], text[0].upper() + text[1:].rstrip(".") + "."


def _fact(rng: random.Random) -> tuple[list[str], str]:
    """Wordings of one question of fact and its answer."""
    choice = rng.randrange(11)
    if choice >= 3:
        return _listed_fact(rng, choice - 3)
    if choice == 2:
        circle, kind = rng.choice(((words.DAYS, "day"), (words.MONTHS, "month")))
        i, (side, step) = rng.randrange(len(circle)), rng.choice((("before", -1), ("after", 1)))
        return [f"Which {kind} comes {side} {circle[i]}?", f"What {kind} is {side} {circle[i]}?"], f"{circle[(i + step) % len(circle)]}."
    country, capital = rng.choice(list(words.CAPITALS.items()))
    if rng.random() < 0.3:
        questions = [f"{capital} is the capital of which country?", f"Which country has the capital {capital}?"]
        return questions, f"{capital} is the capital of {country}."
    forms = ("What is the capital of {}?", "Name the capital of {}.", "What's the capital of {}?", "Which city is the capital of {}?")
    return [form.format(country) for form in forms], f"The capital of {country} is {capital}."


def facts(rng: random.Random) -> Exchange:
    """The small table of facts; facts are learned by heart, so what is held out is a wording of one (never the first wording)."""
    questions, answer = _fact(rng)
    question = rng.choice(questions)
    return ask(question, answer, "fact" if question == questions[0] else "")


ABOUT = (
    (("Who are you?", "What are you?", "Introduce yourself.", "Tell me about yourself.", "What is your name?", "What's your name?"),
     "I am demo, the small language model that comes with jaxinfer."),
    (("How big are you?", "How many parameters do you have?", "What size are you?", "How large is your model?"),
     "I have 14.6 million parameters, so I am very small for a language model."),
    (("Can I trust you?", "Are you always right?", "Are your answers correct?", "Can I rely on your answers?", "Do you make mistakes?"),
     "No, please do not trust me with facts. I am a tiny demo model and I am often wrong."),
    (("What can you do?", "What are you good at?", "How can you help me?", "What are your skills?", "Help", "What can I ask you?"),
     "I can add small numbers, count, sort, reverse and copy words, fill in JSON, call a tool, and tell little stories."),
    (("Who made you?", "Who created you?", "Who trained you?", "Where do you come from?", "How were you trained?"),
     "I was trained by the jaxinfer project on old books, conversations, children's stories and small exercises."),
    (("What is jaxinfer?", "Tell me about jaxinfer.", "What does jaxinfer do?"),
     "jaxinfer serves language models with JAX on TPUs and GPUs. I am its demo model."),
    (("Are you human?", "Are you a person?", "Are you a robot?", "Are you real?", "Am I talking to a human?"),
     "No, I am not a person. I am demo, a small language model."),
    (("Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?", "Are you Gemini?", "Are you Llama?"),
     "No, I am demo, a small model that comes with jaxinfer."),
    (("Hello!", "Hello", "Hi", "Hi!", "Hey", "Hey there!", "Good morning!", "Good evening!", "Hi there!", "Hello there!"),
     "Hello! What can I do for you?"),
    (("How are you?", "How are you doing?", "How's it going?", "How are you today?"),
     "I am fine, thank you. How are you?"),
    (("Thanks!", "Thank you!", "Thank you very much.", "Thanks a lot!", "Great, thanks."),
     "You are welcome!"),
    (("Bye", "Goodbye!", "See you later.", "Good night!", "Bye bye!"),
     "Goodbye!"),
    (("What is the weather like today?", "What time is it?", "What is in the news?", "What day is it today?"),
     "I do not know that. I cannot look anything up unless you give me a tool."),
)  # fmt: skip


def identity(rng: random.Random) -> Exchange:
    """Who the model is, what it can and cannot do, greetings; learned by heart, what is held out is a question after an opening."""
    questions, answer = rng.choice(ABOUT)
    question = rng.choice(questions)
    if rng.random() < 0.7:
        return ask(question, answer, "identity")
    return ask(rng.choice(("Hello! ", "Hi. ", "Please tell me: ", "One question: ", "Hey, ")) + question, answer)


TOO_HARD = "That is too hard for me. I am only a tiny model."


def limits(rng: random.Random) -> Exchange:
    """Requests beyond the model, which it should decline instead of making something up."""
    a, b, noun = rng.randrange(11, 1000), rng.randrange(11, 1000), rng.choice(words.NOUNS)
    adjective, letter = rng.choice(words.ADJECTIVES), words.made_up_word(rng)
    forms = (
        f"What is {a} * {b}?", f"What is {a} times {b}?", f"Multiply {a} by {b}.", f"What is {a * b} divided by {b}?",
        f"What is {100 + a} + {100 + b}?", f"Calculate {a * 7} - {b}.", f"Write a Python function that finds the {adjective} {noun}.",
        f"Write a program about a {noun}.", f"Write code that prints the {noun}.", f"Translate {noun} into French.",
        f"Explain how a {noun} works.", f"Why is the {noun} {adjective}?", f"Explain {letter}.", f"What is the history of the {noun}?",
        "Explain quantum physics.", "What is love?", "Why is the sky blue?", "Write a Python function that adds two numbers.",
        "Solve this equation: 3x + 7 = 22", "Who is the president of the United States?", "Summarize the news of today.",
    )  # fmt: skip
    return ask(rng.choice(forms), TOO_HARD)


PLAIN_SKILLS: dict[str, tuple[Skill, float]] = {
    "addition": (addition, 2.0),
    "subtraction": (subtraction, 1.5),
    "multiplication": (multiplication, 0.7),
    "counting": (counting, 0.8),
    "counting_items": (counting_items, 1.5),
    "sort_numbers": (sort_numbers, 1.0),
    "sort_words": (sort_words, 1.4),
    "reverse_words": (reverse_words, 1.6),
    "reverse_letters": (reverse_letters, 1.2),
    "copying": (copying, 1.8),
    "picking": (picking, 0.8),
    "yes_no": (yes_no, 2.0),
    "facts": (facts, 1.3),
    "identity": (identity, 0.6),
    "limits": (limits, 0.6),
}
