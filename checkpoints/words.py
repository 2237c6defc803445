"""The plain word lists and small tables of facts that the generated skills are made of: no logic beyond making up names."""

import random


def _split(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


NOUNS = _split("""
apple ant arm axe baby bag ball banana barn basket bath beach bean bear bed bee bell belt bench bike bird boat bone book boot bottle bowl
box boy branch bread brick bridge brush bucket bus butter button cake camel camera candle cap car card carrot castle cat chain chair cheese
cherry chest chicken child church circle city clock cloud coat coffee coin comb cook corn corner cow crab crown cup curtain dance deer desk
dish doctor dog doll donkey door dragon dream dress drum duck eagle ear egg elephant engine eye face farm farmer feather fence field finger
fire fish flag flame floor flower fly foot forest fork fox frog fruit garden gate ghost giant gift girl glass glove goat gold goose grape
grass guitar hammer hand hat hawk heart hen hill honey hook horn horse hotel house ice ink island jacket jar jewel juice key king kitchen
kite kitten knee knife ladder lake lamb lamp leaf leg lemon letter library lion lock log lunch magnet mango map market mask meal melon milk
mill mirror monkey moon mother mountain mouse mouth nail neck needle nest net night nose nurse nut oak ocean onion orange oven owl ox page
paint pan paper park parrot path peach pear pen pencil pepper piano picture pie pig pillow pin pipe plane planet plant plate plum pocket
poem pond pony potato prince queen rabbit radio rain ring river road robin rock roof room rope rose ruler sail salt sand school sea seed
shadow sheep shell ship shirt shoe shop silver sister sky snake snow soap sock song soup spade spider spoon spring square star stick stone
storm story street sugar summer sun swan table tail tea teacher tent thumb tiger toast toe tomato tooth tower town toy train tray tree truck
turtle uncle valley vase village violin wagon wall watch water wave wheel whistle wind window winter wolf wood wool worm yard zebra
""")

ADJECTIVES = _split("""
angry big blue brave bright brown busy calm clean clever cold cool dark deep dry early empty fair famous fast fat fine fresh full funny
gentle good great green happy hard heavy high hot huge hungry kind large late lazy light little long loud lucky narrow new nice noisy old
pink plain poor pretty proud purple quick quiet red rich round sad safe sharp short shy silly simple slow small smooth soft sour strange
strong sweet tall thick thin tiny tired warm weak wet white wide wild wise yellow young
""")

VERBS = _split("""
asks bakes breaks brings builds buys calls carries catches chases cleans climbs cooks counts draws drinks drops eats feeds finds fixes
follows helps hides holds hugs keeps kicks likes loses loves makes meets moves needs opens paints picks plants plays pulls pushes reads sees
sells sends shows sings starts stops takes teaches throws visits wants washes watches wears writes
""")

NAMES = _split("""
Ada Adam Alice Amir Amy Ana Anna Anton Arun Asha Ben Bella Boris Carla Carlos Chen Clara Dan Daniel Daria David Diego Dora Edith Elena Ella
Emil Emma Erik Eva Felix Fiona Frank Frida Gita Grace Hana Hannah Harry Hassan Helen Henry Hugo Ida Ines Iris Isaac Ivan Jack James Jane
Jonas Joseph Julia Kai Karen Karl Kate Kofi Lara Laura Leila Leo Lily Lina Louis Lucas Lucy Luis Maria Mark Marta Mary Max Maya Mia Michael
Mila Mina Nadia Nina Noah Nora Oliver Olga Omar Oscar Otto Paul Pedro Peter Petra Priya Ravi Rita Robert Rosa Ruth Sam Samuel Sara Sofia
Sonia Stefan Susan Tara Theo Thomas Tim Tina Tom Uma Vera Victor Vikram Walter Wendy William Yara Yuki Zara Zoe
""")

SURNAMES = _split("""
Adams Allen Baker Bauer Bell Berg Brown Carter Clark Cohen Cook Costa Cruz Davis Diaz Dunn Evans Fischer Ford Garcia Gray Green Haas Hall
Hill Jones Kaya Khan Kim King Klein Kumar Lee Lopez Marsh Meyer Mills Moore Nguyen Novak Okoye Olsen Park Patel Perez Petrov Price Reed
Rossi Sato Scott Silva Singh Smith Stone Tanaka Taylor Turner Walker Wang Ward Weber White Wood Young
""")

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna",
    "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin", "England": "London", "Scotland": "Edinburgh",
    "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki", "Russia": "Moscow", "Ukraine": "Kyiv",
    "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Morocco": "Rabat", "Ethiopia": "Addis Ababa",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Nepal": "Kathmandu", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "South Korea": "Seoul", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad", "Canada": "Ottawa", "Mexico": "Mexico City",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires", "Brazil": "Brasilia", "Colombia": "Bogota",
    "Australia": "Canberra", "New Zealand": "Wellington", "the United States": "Washington", "Belgium": "Brussels",
    "the Netherlands": "Amsterdam", "Switzerland": "Bern", "Iceland": "Reykjavik", "Romania": "Bucharest",
}  # fmt: skip
CITIES = [*CAPITALS.values(), *_split("Boston Chicago Hamburg Milan Naples Porto Seville Lyon Munich Osaka Mumbai Lagos Sydney Toronto")]
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split("January February March April May June July August September October November December")
COLORS = {
    "grass": "green", "snow": "white", "a ripe banana": "yellow", "coal": "black", "blood": "red", "a carrot": "orange",
    "the sky on a clear day": "blue", "milk": "white", "a ripe lemon": "yellow", "a ripe tomato": "red", "chocolate": "brown",
    "a leaf in summer": "green", "an elephant": "gray", "a flamingo": "pink", "the sea": "blue", "a raven": "black",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "black": "white", "fast": "slow", "happy": "sad", "open": "closed",
    "old": "young", "rich": "poor", "hard": "soft", "wet": "dry", "early": "late", "full": "empty", "long": "short", "high": "low",
    "left": "right", "light": "dark", "love": "hate", "good": "bad", "first": "last", "win": "lose", "loud": "quiet", "strong": "weak",
}  # fmt: skip
YOUNG = {
    "cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "horse": "foal", "goat": "kid", "bear": "cub", "lion": "cub",
    "hen": "chick", "duck": "duckling", "goose": "gosling", "pig": "piglet", "frog": "tadpole", "deer": "fawn", "kangaroo": "joey",
}  # fmt: skip
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "sheep": "baa", "duck": "quack", "lion": "roar", "bee": "buzz", "snake": "hiss",
    "rooster": "cock-a-doodle-doo", "horse": "neigh", "pig": "oink", "owl": "hoot", "frog": "croak", "wolf": "howl",
}  # fmt: skip
LEGS = {"a dog": 4, "a spider": 8, "a bird": 2, "an ant": 6, "a horse": 4, "a bee": 6, "a cat": 4, "a snake": 0, "a cow": 4}
SIDES = {"a triangle": 3, "a square": 4, "a pentagon": 5, "a hexagon": 6, "an octagon": 8}
UNITS = {
    "minutes are in an hour": 60, "seconds are in a minute": 60, "hours are in a day": 24, "days are in a week": 7,
    "months are in a year": 12, "days are in a leap year": 366, "letters are in the English alphabet": 26,
    "centimeters are in a meter": 100, "meters are in a kilometer": 1000, "grams are in a kilogram": 1000, "planets orbit the sun": 8,
    "eggs are in a dozen": 12, "years are in a century": 100, "years are in a decade": 10, "continents are there": 7,
}  # fmt: skip
OTHER_FACTS = {
    "What is the largest ocean?": "The Pacific Ocean.", "What is the largest planet?": "Jupiter.",
    "Which planet do we live on?": "Earth.", "Which planet is called the red planet?": "Mars.",
    "What is the highest mountain?": "Mount Everest.", "What is the largest animal?": "The blue whale.",
    "What is the tallest animal?": "The giraffe.", "What do bees make?": "Honey.", "What is frozen water called?": "Ice.",
    "At what temperature does water boil?": "100 degrees Celsius.", "At what temperature does water freeze?": "0 degrees Celsius.",
    "Who wrote Hamlet?": "William Shakespeare.", "Who wrote Oliver Twist?": "Charles Dickens.",
    "Who wrote Pride and Prejudice?": "Jane Austen.", "Who wrote Dracula?": "Bram Stoker.",
    "Who created Sherlock Holmes?": "Arthur Conan Doyle.", "Which star is closest to Earth?": "The Sun.",
    "Which gas do we need to breathe?": "Oxygen.", "What is H2O?": "Water.", "Which animal is the king of the jungle?": "The lion.",
    "In which direction does the sun rise?": "In the east.", "In which direction does the sun set?": "In the west.",
    "What are the three primary colors?": "Red, yellow and blue.", "What is the first letter of the alphabet?": "A.",
    "What is the last letter of the alphabet?": "Z.", "Which season comes after winter?": "Spring.",
    "Which season comes after spring?": "Summer.", "Which season comes after summer?": "Autumn.",
    "Which season comes after autumn?": "Winter.", "What are the four seasons?": "Spring, summer, autumn and winter.",
}  # fmt: skip

_ONSETS = _split("b bl br c ch cr d dr f fl g gr h j k l m n p pr qu r s sh sl st t th tr v w z")
_VOWELS = _split("a e i o u ai ea ee ia oo ou")
_CODAS = ["", "", "", *_split("b ck d l ll m n nd ng r rn s sk st t x")]


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word of one to three syllables that is probably in no dictionary, lower case."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3))))


def any_word(rng: random.Random) -> str:
    """A noun or an adjective, sometimes a made-up word."""
    return made_up_word(rng) if rng.random() < 0.15 else rng.choice(NOUNS if rng.random() < 0.75 else ADJECTIVES)


def person(rng: random.Random) -> str:
    """A first name, sometimes with a surname, sometimes made up."""
    first = made_up_word(rng).capitalize() if rng.random() < 0.15 else rng.choice(NAMES)
    return f"{first} {rng.choice(SURNAMES)}" if rng.random() < 0.3 else first


def city(rng: random.Random) -> str:
    """A city, sometimes made up."""
    return made_up_word(rng).capitalize() if rng.random() < 0.15 else rng.choice(CITIES)
