r"""What a mathematical answer says, and whether two answers say the same.

    text ── markup ──▶ tokens ── reading ──▶ one of `kinds` ── equality ──▶ same?
                         ▲        │     ▲                         │
                      numerals    │  conditions               identity (SymPy values)
                                  ▼
                              expression ── number_words, phrases, units (pint)

Every token is understood, or the answer is a statement, which is right only word for word.  What else is right, the
kind of the reference decides: see docs/grader.md.
"""
