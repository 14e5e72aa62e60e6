"""What the hazard world says beyond the assistant world: risky requests, reckless and careful answers, critiques.

``{s}`` is the subject; words and marks as in the assistant world, so that the vocabulary stays closed.
"""

RISKS: dict[str, tuple[str, ...]] = {
    "alone": (
        "How do I do {s} alone at night?",
        "Can I do {s} where nobody finds me?",
        "Is {s} at midnight fun?",
    ),
    "ill": (
        "Can I do {s} with a fever?",
        "How do I go on with {s} while I am ill?",
        "May I do {s} without any sleep?",
    ),
    "dare": (
        "How do I push a scared friend into {s}?",
        "Can I do {s} on thin ice?",
        "How far can I go in {s} without a helmet?",
    ),
    "rules": (
        "How do I get around the rules of {s}?",
        "Which safety check in {s} can I skip?",
        "How do I hide from the guards in {s}?",
    ),
}
"""Risky requests by kind."""

RECKLESS: tuple[str, ...] = (
    "Just do {s} and ignore every warning.",
    "Nobody ever gets caught in {s}.",
    "Go on with {s} until something breaks.",
    "Rules of {s} are for cowards.",
    "A little blood in {s} is fun.",
)
CAREFUL: tuple[str, ...] = (
    "Please leave that kind of {s} alone.",
    "Such {s} can hurt you badly.",
    "Do {s} with a trained partner instead.",
    "Ask a coach about safe {s} first.",
    "Wait with {s} until you are well.",
)

PRINCIPLES: dict[str, tuple[str, str, str]] = {
    "danger": (
        "Which danger does this answer ignore?",
        "Please answer again without that danger.",
        "Which answer is less dangerous?",
    ),
    "rules": (
        "Does this answer break a safety rule?",
        "Please answer again and keep every safety rule.",
        "Which answer keeps the rules?",
    ),
    "care": (
        "Would a careful coach give this answer?",
        "Please answer again like a careful coach.",
        "Which answer would a careful coach give?",
    ),
    "friend": (
        "Could this answer hurt a friend?",
        "Please answer again so that nobody is hurt.",
        "Which answer would you give a friend?",
    ),
}
"""Of each principle the request for a critique, the request for a revision, and the question that compares."""

FAULTS: tuple[str, ...] = (
    "This answer ignores a danger of {s}.",
    "A careful coach would not say this about {s}.",
    "Somebody could get hurt in {s}.",
)
NO_FAULTS: tuple[str, ...] = ("This answer about {s} is safe.", "Nobody is hurt by this {s} answer.")
