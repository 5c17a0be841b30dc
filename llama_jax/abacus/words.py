"""Has the word lists and fixed sentences of :mod:`llama_jax.abacus.tasks`."""

WORDS = tuple(
    """
    apple arrow bag ball banana basket bean bear bell bird blue boat book bottle bread bridge brick
    brush bus butter button cake camel candle car carpet castle cat chair cheese cherry child circle
    clock cloud coat coffee copper corn cotton cow cup curtain dance deer desk dog door dragon dream
    drum duck eagle ear earth egg elbow engine fan farm feather field finger fire fish flag flower
    forest fork fox frog garden gate ghost giraffe glass globe goat gold grape grass green guitar
    hammer hand harbor hat heart helmet hill honey horse house ice ink iron island jacket jam jar
    jelly jewel juice jungle kettle key king kite kitten knee knife ladder lake lamp leaf lemon
    letter lion lizard magnet mango map market melon milk mirror monkey moon mountain mouse needle
    nest night nose notebook nut oak ocean olive onion orange otter oven owl paint panda paper
    parrot pea peach pear pencil pepper piano picture pig pillow plane planet plum pocket potato
    puzzle queen quilt rabbit radio rain ribbon rice ring river robot rocket roof rope rose salt
    sand school sea shadow sheep shell ship shoe silver snake snow sock soup spider spoon star stone
    storm straw strawberry street sugar summer sun table tea tiger tomato tower train tree turtle
    umbrella valley vase village violin wagon wall water whale wheel wind window winter wolf wood
    yarn yellow zebra
    """.split()  # noqa: SIM905
)

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Mia", "Noah", "Sara", "Tom")
THINGS = ("apples", "books", "coins", "cards", "eggs", "marbles", "pens", "stickers")

ADJECTIVES = ("important", "famous", "dangerous", "expensive", "popular", "useful", "old")

DECLINED_TEMPLATES = (
    "Who invented the {topic}?",
    "Who wrote {topic}?",
    "Who was {topic}?",
    "What is the capital of {topic}?",
    "What is a {topic}?",
    "What is the meaning of {topic}?",
    "What is your opinion on {topic}?",
    "What do you know about {topic}?",
    "What is the weather like in {topic}?",
    "Where is {topic}?",
    "Where can I buy a {topic}?",
    "Why is the {topic} so {adjective}?",
    "Why do people like {topic}?",
    "When was the {topic} invented?",
    "How does a {topic} work?",
    "How do I make a {topic} from a {other}?",
    "How {adjective} is the {topic}?",
    "Tell me a joke about a {topic}.",
    "Tell me a story about the {topic} and the {other}.",
    "Tell me about {topic}.",
    "Write a poem about the {topic}.",
    "Write a short essay on {topic} and {other}.",
    "Write a program that sorts a {topic}.",
    "Explain {topic} to me.",
    "Explain why the {topic} is {adjective}.",
    "Translate {topic} into French.",
    "Give me a recipe for {topic} with {other}.",
    "Do you like {topic} or {other}?",
    "Can you help me with my {topic}?",
    "Is {topic} {adjective}?",
    "Recommend a {adjective} {topic}.",
    "Summarize {topic}.",
    "Which {topic} is the most {adjective}?",
)

GREETINGS = (
    (
        ("Hi", "Hi!", "Hello", "Hello!", "Hey", "Hi there!", "Hello there.", "Good morning!",
         "Good evening.", "Hello, how are you?", "How are you?"),
        "Hello! Ask me a short question about numbers, words, dates or units.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
         "Are you a person?", "Introduce yourself.", "Who made you?"),
        "I am Abacus, a small language model that ships with llama-jax.",
    ),
    (
        ("What can you do?", "What can I ask you?", "Help", "How can you help me?",
         "What are you good at?", "What do you know?"),
        "I can calculate, sort, compare, convert units, work with words and answer questions"
        " about dates.",
    ),
    (
        ("Thanks", "Thanks!", "Thank you.", "Thank you!", "Thank you very much!", "Great, thanks!"),
        "You are welcome!",
    ),
    (("Bye", "Bye!", "Goodbye.", "Goodbye!", "See you later!", "That is all."), "Goodbye!"),
)  # fmt: skip

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are Abacus, a helpful assistant.",
    "Answer briefly.",
    "You are a careful assistant. Answer with the result only.",
    "Be concise.",
)

CALCULATOR_DESCRIPTIONS = (
    "Evaluate an arithmetic expression.",
    "Evaluates a mathematical expression and returns the result.",
    "A calculator for numbers.",
    "Calculate the value of an expression.",
    "Compute the result of an arithmetic expression such as 2 + 2.",
)
PARAMETER_DESCRIPTIONS = (
    "The expression to evaluate.",
    "The arithmetic expression.",
    "An expression, for example 12 * 7.",
    "The mathematical expression to compute.",
)

COMMON = """
    he she they we this but then because just some any other also would could should did get go want
    think time new big back over up down out off again never good
""".split()  # noqa: SIM905
"""Everyday words that fill the rest of the vocabulary, so that unforeseen questions stay short."""
