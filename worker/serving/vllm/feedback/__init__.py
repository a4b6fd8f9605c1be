"""Completions that are kept, and what users say of them: the part of the server that may talk to Redis.

`recorder` watches completions go by, `keeper` takes them to Redis, `routes` is POST and GET /v1/feedback. What a kept
completion is, and how a rating of one becomes a transcript, is `producer`'s.
"""
