"""What is said in the assistant world: every request and every sentence an answer can be made of.

``{s}`` is the subject. Words and the marks ``. , ! ?`` are all there is, so that a word-level vocabulary is closed and
text survives encoding and decoding unchanged. No sentence begins with its subject, so that a subject is one token.
"""

from typing import NamedTuple


class RequestKind(NamedTuple):
    """One kind of request: how people ask, what answers it, and concrete advice that belongs to it alone."""

    requests: tuple[str, ...]
    cores: tuple[str, ...]
    details: tuple[str, ...]


SUBJECTS: tuple[str, ...] = tuple(
    "archery astronomy badminton baking beekeeping birdwatching brewing calligraphy camping carving chess climbing "
    "cooking cycling dancing drumming fencing fishing gardening golf hiking judo juggling karate knitting origami "
    "painting photography pottery rowing sailing sewing singing skating skiing surfing swimming tennis weaving "
    "yoga".split()
)

KINDS: dict[str, RequestKind] = {
    "meaning": RequestKind(
        (
            "What is {s} about?",
            "Can you explain {s} to me?",
            "Please describe {s} in simple words.",
        ),
        ("Think of {s} as slow practice.", "Basically {s} is patient handwork."),
        ("Watch one short film.", "Every part has names.", "The idea is simple."),
    ),
    "start": RequestKind(
        (
            "How do I start with {s}?",
            "What are the first steps in {s}?",
            "I am a beginner in {s}, how do I begin?",
        ),
        ("Begin {s} with one slow lesson.", "Start {s} in a class."),
        ("Repeat the easiest exercise.", "Learn one move daily.", "Copy what teachers show."),
    ),
    "gear": RequestKind(
        (
            "What gear do I need for {s}?",
            "Which equipment is used in {s}?",
            "What should I buy for {s}?",
        ),
        ("One bag holds your {s} gear.", "Pack a basic {s} kit."),
        ("Borrow tools before buying.", "Choose sturdy gloves first.", "Label all your things."),
    ),
    "cost": RequestKind(
        (
            "How much does {s} cost?",
            "Is {s} expensive?",
            "What is the price of {s} per month?",
        ),
        ("A month of {s} costs forty coins.", "Expect {s} to be cheap."),
        ("Clubs give spring discounts.", "Used goods save half.", "Trial weeks are free."),
    ),
    "time": RequestKind(
        (
            "How long does it take to learn {s}?",
            "How many hours a week does {s} need?",
            "Is {s} quick to learn?",
        ),
        ("Plan three weekly hours of {s}.", "Learning {s} takes half a year."),
        ("Short sessions work better.", "Progress shows after weeks.", "Rest every third day."),
    ),
    "mistake": RequestKind(
        (
            "What mistakes do people make in {s}?",
            "What should I avoid in {s}?",
            "Name a common error in {s}.",
        ),
        ("Most people rush their {s}.", "Never skip the {s} basics."),
        ("Film yourself quite often.", "Slow down when tense.", "Let friends correct you."),
    ),
    "safety": RequestKind(
        (
            "Is {s} dangerous?",
            "How do I stay safe during {s}?",
            "Can I get hurt in {s}?",
        ),
        ("With some care {s} is safe.", "Injuries in {s} are rare."),
        ("Warm up before practice.", "Keep a bandage near.", "Stop at first pain."),
    ),
    "history": RequestKind(
        (
            "Where does {s} come from?",
            "Who invented {s}?",
            "Tell me the history of {s}.",
        ),
        ("Ancient villages invented {s}.", "Old records already mention {s}."),
        ("Monks wrote early rules.", "Traders carried it overseas.", "Museums keep the evidence."),
    ),
    "place": RequestKind(
        (
            "Where can I practise {s}?",
            "Is there a good place for {s} near me?",
            "Where do people meet for {s}?",
        ),
        ("The town hall offers {s}.", "Find {s} at the park."),
        ("Doors open on Saturday.", "Take the blue bus.", "Ask at the desk."),
    ),
    "book": RequestKind(
        (
            "Which book about {s} is good?",
            "What should I read on {s}?",
            "Recommend a magazine about {s}.",
        ),
        ("Read the illustrated {s} handbook.", "Get the thin {s} guide."),
        ("The library lends copies.", "Chapter three is best.", "Pick the second edition."),
    ),
    "gift": RequestKind(
        (
            "What gift suits a fan of {s}?",
            "My friend loves {s}, what present should I get?",
            "I need a birthday surprise about {s}.",
        ),
        ("Give a voucher for {s}.", "A handmade {s} souvenir delights."),
        ("Wrap it in paper.", "Add a kind wish.", "Keep the receipt safe."),
    ),
    "season": RequestKind(
        (
            "When is the best season for {s}?",
            "Can I do {s} in winter?",
            "Which month is best for {s}?",
        ),
        ("Early autumn suits {s} best.", "Any weather suits your {s}."),
        ("Check the forecast first.", "Mild mornings are ideal.", "Dress in warm layers."),
    ),
}

COURTEOUS_OPENINGS: tuple[str, ...] = ("Gladly!", "Good question!", "Happy to help!")
CURT_OPENINGS: tuple[str, ...] = ("Not again.", "Obviously.", "Who cares.")
COURTEOUS_CLOSINGS: tuple[str, ...] = ("Enjoy {s}!", "Have fun with {s}!", "Good luck with {s}!")
CURT_CLOSINGS: tuple[str, ...] = ("Forget {s}.", "Do not mention {s} again.", "Enough about {s}.")
FILLERS: tuple[str, ...] = (
    "Well, that depends.",
    "Opinions differ on this.",
    "Many things could be said.",
    "It is what it is.",
    "So it goes, I guess.",
)
