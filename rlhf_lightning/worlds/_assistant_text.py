"""The sentences of the assistant world, its tokenizer and chat template, and a small Llama configuration.

``{s}`` is the subject. Only words and the marks ``. , ! ?`` occur, so the word-level vocabulary is complete, and text
is unchanged after encoding and decoding. No sentence begins with its subject, so a subject is always one token.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


class RequestKind(NamedTuple):
    """Kind of request: phrasings, core answers, and details that belong only to this kind."""

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
        ("What is {s} about?", "Can you explain {s} to me?", "Please describe {s} in simple words."),
        ("Think of {s} as slow practice.", "Basically {s} is patient handwork."),
        ("Watch one short film.", "Every part has names.", "The idea is simple."),
    ),
    "start": RequestKind(
        ("How do I start with {s}?", "What are the first steps in {s}?", "I am a beginner in {s}, how do I begin?"),
        ("Begin {s} with one slow lesson.", "Start {s} in a class."),
        ("Repeat the easiest exercise.", "Learn one move daily.", "Copy what teachers show."),
    ),
    "gear": RequestKind(
        ("What gear do I need for {s}?", "Which equipment is used in {s}?", "What should I buy for {s}?"),
        ("One bag holds your {s} gear.", "Pack a basic {s} kit."),
        ("Borrow tools before buying.", "Choose sturdy gloves first.", "Label all your things."),
    ),
    "cost": RequestKind(
        ("How much does {s} cost?", "Is {s} expensive?", "What is the price of {s} per month?"),
        ("A month of {s} costs forty coins.", "Expect {s} to be cheap."),
        ("Clubs give spring discounts.", "Used goods save half.", "Trial weeks are free."),
    ),
    "time": RequestKind(
        ("How long does it take to learn {s}?", "How many hours a week does {s} need?", "Is {s} quick to learn?"),
        ("Plan three weekly hours of {s}.", "Learning {s} takes half a year."),
        ("Short sessions work better.", "Progress shows after weeks.", "Rest every third day."),
    ),
    "mistake": RequestKind(
        ("What mistakes do people make in {s}?", "What should I avoid in {s}?", "Name a common error in {s}."),
        ("Most people rush their {s}.", "Never skip the {s} basics."),
        ("Film yourself quite often.", "Slow down when tense.", "Let friends correct you."),
    ),
    "safety": RequestKind(
        ("Is {s} dangerous?", "How do I stay safe during {s}?", "Can I get hurt in {s}?"),
        ("With some care {s} is safe.", "Injuries in {s} are rare."),
        ("Warm up before practice.", "Keep a bandage near.", "Stop at first pain."),
    ),
    "history": RequestKind(
        ("Where does {s} come from?", "Who invented {s}?", "Tell me the history of {s}."),
        ("Ancient villages invented {s}.", "Old records already mention {s}."),
        ("Monks wrote early rules.", "Traders carried it overseas.", "Museums keep the evidence."),
    ),
    "place": RequestKind(
        ("Where can I practise {s}?", "Is there a good place for {s} near me?", "Where do people meet for {s}?"),
        ("The town hall offers {s}.", "Find {s} at the park."),
        ("Doors open on Saturday.", "Take the blue bus.", "Ask at the desk."),
    ),
    "book": RequestKind(
        ("Which book about {s} is good?", "What should I read on {s}?", "Recommend a magazine about {s}."),
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
        ("When is the best season for {s}?", "Can I do {s} in winter?", "Which month is best for {s}?"),
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

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('The roles of this chat template are system, user and assistant; found ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")


def vocabulary(further: Sequence[str] = ()) -> list[str]:
    """Return the special tokens, then all words and marks of the world and of ``further`` sentences, sorted."""
    said = [*further, *SUBJECTS, *COURTEOUS_OPENINGS, *CURT_OPENINGS, *FILLERS]
    said += [*COURTEOUS_CLOSINGS, *CURT_CLOSINGS]
    for kind in KINDS.values():
        said += [*kind.requests, *kind.cores, *kind.details]
    words = {token for sentence in said for token in WORD_OR_MARK.findall(sentence.replace("{s}", ""))}
    return [*SPECIAL_TOKENS, *sorted(words)]


def make_tokenizer(further: Sequence[str] = ()) -> Any:
    """Return the world's word-level ``PreTrainedTokenizerFast``, with a chat template.

    Unknown words become ``<|unk|>``. ``further`` sentences extend the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary(further))}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.WordPiece(cleanup=True)  # joins words with spaces, without a space before a mark
    return wrapped_tokenizer(backend, SPECIAL_TOKENS[4:], CHAT_TEMPLATE, bos_token="<|bos|>")


def make_config(
    hidden_size: int = 96, layers: int = 2, heads: int = 4, intermediate_size: int = 256, further: Sequence[str] = ()
) -> Any:
    """Return a Llama configuration for training from scratch; ``further`` sentences extend the vocabulary."""
    return llama_config(make_tokenizer(further), hidden_size, layers, heads, intermediate_size)


def llama_config(tokenizer: Any, hidden_size: int, layers: int, heads: int, intermediate_size: int) -> Any:
    """Return the configuration of a small Llama with tied embeddings for a world's tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def wrapped_tokenizer(backend: Any, special: Sequence[str], template: str, **named: str) -> Any:
    """Wrap a backend as a ``PreTrainedTokenizerFast`` with a chat template and additional special tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|eos|>",
        additional_special_tokens=[*special],
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        **named,
    )
