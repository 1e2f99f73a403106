"""Pages from records and verdicts: no number is typed by hand, and nothing here measures.

``points`` joins each arm's loss with its memory and speed; ``answer`` says what a page says first and ``charts`` draws.
``page`` composes BENCHMARK_RESULTS.md from them and from the ``tables`` of each suite, which are made of ``cells``;
``html`` makes the page that answers to its reader, ``export`` all other forms, ``hub`` uploads one, and ``files``
writes a run's pages.
``guide`` fills the figures of hand-written pages. ``junit`` and ``github`` tell a gate's findings to machines. A new
suite changes ``tables`` alone.
"""
