"""Pages from records and verdicts: no number is typed by hand, and nothing here measures.

``page`` composes BENCHMARK_RESULTS.md from the ``tables`` of each suite, which are made of ``cells``; ``html`` adds
``plots`` to it, and ``files`` writes both. ``guide`` fills the figures of hand-written pages. ``junit`` and ``github``
tell a gate's findings to machines. A new suite changes ``tables`` alone.
"""
