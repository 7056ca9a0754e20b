"""Customers' texts in the customer's language.

`language`: what a text, a date, a number or a list looks like in a language (pure). `catalogues`: which languages
there are, read from `locale/`.
"""
