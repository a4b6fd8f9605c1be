"""The page: a view of learning, served by `tandem dashboard` beside rq-dashboard.

In: Redis, the server's control socket. Out: HTML, SVG, and, where allowed, an operator's actions.
"""
