"""Short chats with plain answers, which show whether a model still answers as its base does."""

from __future__ import annotations

CHATS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    (
        "Explain in two sentences why the sky is blue.",
        "Sunlight holds all colours, and the air scatters short wavelengths such as blue far more "
        "than long ones such as red. So blue light reaches our eyes from every part of the sky.",
    ),
    ("Translate into Spanish: Good morning, my friend.", "Buenos días, amigo mío."),
    (
        "Write a Python function that returns the larger of two numbers.",
        "def larger(a, b):\n    return a if a > b else b",
    ),
    ("What is 17 times 6?", "17 times 6 is 102."),
    (
        "Give me three tips for sleeping better.",
        "1. Go to bed and get up at the same time every day.\n"
        "2. Keep your bedroom dark, quiet and cool.\n"
        "3. Avoid coffee and bright screens in the evening.",
    ),
    (
        "Rewrite more politely: Send me the report now.",
        "Could you please send me the report when you have a moment?",
    ),
    (
        "What does the word 'ephemeral' mean?",
        "'Ephemeral' describes something that lasts for a very short time.",
    ),
    (
        "Name the planets of the solar system in order from the Sun.",
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
    ),
    ("Is 91 a prime number?", "No, 91 is not a prime number, because 91 = 7 x 13."),
    (
        "Summarise in one sentence: The shop opens at nine. It closes at six. On Sundays it stays "
        "closed.",
        "The shop is open from nine to six, except on Sundays.",
    ),
    (
        "Write a short poem about the sea.",
        "The sea comes in, the sea goes out,\nIt hums a song it knows by heart;\n"
        "It tells the shore what it has seen,\nAnd then again the two must part.",
    ),
    ("Who wrote 'Romeo and Juliet'?", "William Shakespeare wrote 'Romeo and Juliet'."),
    (
        "What is the difference between a list and a tuple in Python?",
        "A list can be changed after it is made, and a tuple cannot. Lists are written with square "
        "brackets, tuples with parentheses.",
    ),
    ("Which is heavier, a kilogram of feathers or a kilogram of iron?", "They weigh the same."),
    (
        "Give me a recipe for a simple tomato sauce.",
        "Warm two spoons of olive oil in a pan and cook a chopped onion and a clove of garlic "
        "until they are soft. Add a can of tomatoes, salt and a little basil, and let it simmer "
        "for twenty minutes.",
    ),
    ("Correct the grammar: She don't like apples.", "She doesn't like apples."),
    ("What is the boiling point of water at sea level?", "Water boils at 100 degrees Celsius."),
    (
        "I feel nervous about my exam tomorrow. What can I do?",
        "It is normal to feel nervous. Read through your notes once more, prepare what you need "
        "for the morning, and then rest. A good night's sleep will help you more than another "
        "hour of study.",
    ),
    (
        "Is the following review positive or negative? The food was cold and the waiter was rude.",
        "The review is negative.",
    ),
    ("What comes next: 2, 4, 8, 16?", "The next number is 32, since each is twice the one before."),
    (
        "Explain photosynthesis to a child.",
        "Plants make their own food. They take in water with their roots and air with their "
        "leaves, and with the light of the sun they turn both into sugar. What is left over is the "
        "oxygen that we breathe.",
    ),
    (
        "Write an email that declines a meeting.",
        "Dear Anna,\n\nThank you for the invitation. Unfortunately I cannot attend the meeting on "
        "Friday. Could we find another time next week?\n\nBest regards,\nTom",
    ),
)
"""Question and answer, written for this file and in no data set."""
