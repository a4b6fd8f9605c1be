"""What goes out on a pipeline in fewer commands does what the single ones did."""

import redis
from redis.client import Pipeline

from worker.consumer.pipelines import merge


def test_merged_commands_do_what_the_single_ones_did(connection: redis.Redis) -> None:
    def queue(pipe: Pipeline) -> None:
        for i in range(3):
            pipe.hset(f"h{i}", mapping={"a": i})
            pipe.hset(f"h{i}", "b", i)
            pipe.hset("shared", "last", i)
            pipe.zadd("z", {f"m{i}": i})
            pipe.zadd("flagged", {f"m{i}": i}, xx=True)
            pipe.sadd("s", i)
            pipe.zrem("old", f"m{i}")
            pipe.srem("olds", i)
            pipe.delete(f"gone{i}")
            pipe.expire("z", 1000 + i)
            pipe.lrem("l", 1, f"m{i}")

    def prepared() -> Pipeline:
        connection.flushall()
        connection.zadd("old", {f"m{i}": i for i in range(4)})
        connection.sadd("olds", *range(4))
        connection.rpush("l", "m0", "m1", "m1", "m2")
        connection.mset({f"gone{i}": 1 for i in range(4)})
        pipe = connection.pipeline()
        queue(pipe)
        return pipe

    def state() -> dict[bytes, object]:
        dumps = {key: connection.dump(key) for key in connection.keys("*")}
        sets = {key: connection.smembers(key) for key in (b"s", b"olds")}
        return dumps | sets | {b"ttl": connection.ttl("z")}

    prepared().execute()
    single = state()
    pipe = prepared()
    before = len(pipe.command_stack)
    merge(pipe)
    assert len(pipe.command_stack) == before - 3 - 2 * 7
    pipe.execute()
    assert state() == single
