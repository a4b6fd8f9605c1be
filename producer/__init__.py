"""What an application imports: redis, rq and msgpack, never torch."""
