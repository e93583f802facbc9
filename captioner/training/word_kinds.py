"""Words by kind (object, person, action, color, function word), and the names of categories.

English, written for the captions of Flickr8k and COCO. Knows nothing of models or photos.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from captioner.training.confidence import with_plurals
from captioner.training.words import FUNCTION_WORDS, imagenet_names

WordKind: TypeAlias = Literal["object", "person", "action", "color", "function", "other"]
KINDS: tuple[WordKind, ...] = ("object", "person", "action", "color", "function", "other")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PEOPLE = _words("""
adult audience baby bicyclist biker boy bride child climber cowboy crowd cyclist driver family
fighter friend girl goalie group guy hiker kid lady man motorcyclist mother onlooker owner passenger
people person photographer player police racer referee rider runner skateboarder skater skier
snowboarder someone spectator surfer team teenager toddler woman worker
""")
_COLORS = _words("""
beige black blond blonde blue brown gold golden gray green grey multicolored orange pale pink purple
red reddish silver tan white yellow
""")
# Verbs other than "-ing" forms, without those that are mostly nouns in captions ("ride", "jump").
_ACTIONS = _words("""
attempts balances bites blows carries catches chases chews climbs crosses crouches dances dives
drinks drives eats fetches fights flies flips follows gets gives goes grabs grinds hangs helps hits
holds jumps kicks kisses kneels laughs leans leaps licks lies looks makes moves paddles performs
plays poses pulls pushes reaches reads rests rides runs sails says shakes shows sings sits skis
slides smiles sniffs splashes stands stares surfs swims takes talks throws touches tries turns uses
waits walks watches waves wears wrestles
climb dance dive eat get go hold jump kick play pull push ride run sit stand swim throw try walk
watch wear wait wrestle perform perched seated held leaning
""")
_NOT_ACTIONS = _words("""
building ceiling clothing crossing evening landing living marking morning nothing painting parking
railing ring something spring string surrounding swing thing trampling wedding wing during amusing
boating bowling dining king earring duckling sibling outing opening sling
""")
_OBJECTS = _words("""
backpack bag balcony ball balloon band bandanna banana bar barrel barrier basket bat beak beard bed
bench bicycle bike bikini bird blanket board boat book boot bottle bow bowl box branch brick bridge
bubble bucket building bull bus bush cabinet cake camera candle canoe cap car cardboard cart castle
cat cellphone chair chimney church cigarette clock cloth cloud coat coffee collar column computer
cone couch cow cream cup curtain cushion desk dish display dog door dress dresser drum ear elephant
fence fireplace fish flag flower food football fork fountain frisbee fruit garbage gate giraffe
glass glasses glove goat goggles guitar hammock harness hat headband headphones headscarf helmet
hoop horn horse hose house hurdle instrument jacket jean jeans jeep jersey jet kayak keyboard kite
knife ladder lamp laptop leaf leash light log lion machine mailbox mask mat meal microphone mirror
monkey moon motorbike motorcycle mountain mug muzzle necklace net newspaper oven paddle painting
palm pants paper penguin phone piano picture pier pillow pipe pizza plane plant plate pole poodle
poster pot puppy purse rabbit racket racquet raft railing ribbon robe rock rope rug sailboat sand
sandal sandwich scarf scooter screen shark sheep sheet shelf ship shirt shoe shorts shower sign sink
skateboard ski skirt sled slide snake sneaker snowboard sofa spider sprinkler stair staircase statue
stick stone stove streamer suit sunglasses surfboard swan sweater sweatshirt swimsuit swing table
tank tattoo taxi television tent tie tiger tire toilet tool tower towel toy tractor train trampoline
tray tree truck trunk tshirt tub tube turtle tv umbrella uniform van vase vegetable vehicle vest
wagon wall waterfall wetsuit wheel window yacht zebra
""")
# The words for COCO's categories in captions, beside their own names.
CATEGORY_WORDS: dict[str, frozenset[str]] = {
    "person": _words("""
        man woman boy girl child kid person people baby lady guy player toddler someone adult rider
        skier snowboarder surfer skateboarder skater cyclist biker climber hiker runner worker
        crowd
    """),
    "airplane": _words("airplane plane jet"),
    "baseball bat": _words("bat"),
    "baseball glove": _words("glove mitt"),
    "bicycle": _words("bicycle bike"),
    "boat": _words("boat ship sailboat canoe kayak"),
    "car": _words("car taxi suv"),
    "cat": _words("cat kitten"),
    "cell phone": _words("phone cellphone"),
    "couch": _words("couch sofa"),
    "cow": _words("cow cattle bull"),
    "cup": _words("cup mug"),
    "dining table": _words("table"),
    "dog": _words("dog puppy"),
    "donut": _words("donut doughnut"),
    "fire hydrant": _words("hydrant"),
    "hair drier": _words("dryer"),
    "handbag": _words("bag purse handbag"),
    "hot dog": _words("hotdog"),
    "motorcycle": _words("motorcycle motorbike bike"),
    "parking meter": _words("meter"),
    "potted plant": _words("plant"),
    "refrigerator": _words("refrigerator fridge"),
    "remote": _words("remote"),
    "sheep": _words("sheep lamb"),
    "sports ball": _words("ball"),
    "stop sign": _words("sign"),
    "suitcase": _words("suitcase luggage"),
    "teddy bear": _words("bear"),
    "tennis racket": _words("racket racquet"),
    "tie": _words("tie necktie"),
    "traffic light": _words("light"),
    "truck": _words("truck"),
    "tv": _words("tv television monitor"),
    "wine glass": _words("glass"),
}


_ALL_PEOPLE = with_plurals(_PEOPLE)
# Names of classes that captions use for something else.
_NOT_OBJECTS = _words("bank can chest cover drive fly makeup stage")
_ALL_OBJECTS = with_plurals(
    _OBJECTS.union(*(words for category, words in CATEGORY_WORDS.items() if category != "person"))
    | ({name[-1] for name in imagenet_names()} - _NOT_OBJECTS)
)


def category_words(category: str) -> set[str]:
    """Return the words, in singular and plural, that name one of COCO's categories."""
    return with_plurals(CATEGORY_WORDS.get(category, frozenset({category})))


def kind_of(word: str) -> WordKind:
    """Return the kind of a cleaned word; "other" has adjectives, places and what is not listed."""
    if word in FUNCTION_WORDS:
        return "function"
    if word in _ALL_PEOPLE:
        return "person"
    if word in _COLORS:
        return "color"
    is_form = re.fullmatch(r"\w{2,}ing", word) and word not in _NOT_ACTIONS
    if word in _ACTIONS or is_form:
        return "action"
    return "object" if word in _ALL_OBJECTS else "other"
