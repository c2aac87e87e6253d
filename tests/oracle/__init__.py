"""An oracle for a server under load: every request is written down, and its end held against the offline answer.

    PYTHONPATH=tests python -m oracle --seconds 600

`subjects` makes models and the right answers, `journal` keeps what was asked and how it ended and finds what is wrong,
`traffic` asks, `soak` runs all of it against a server process.
"""
