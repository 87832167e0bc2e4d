"""Training text: read documents, cut them into texts of tokens, and put the texts into a seeded order.

Nothing here knows of models or trainers.
"""
