"""Human feedback: a store of judgements, the page they are made on, and the rows that training reads of them.

Knows no models: completions to be judged come from outside, and judgements leave as rows of the forms that `data`
reads.
"""
