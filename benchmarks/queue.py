"""How fast the queue is: `python benchmarks/queue.py`; the measurements are in queue_speed.py.

A script of this folder that imports the standard library's `queue` would find this file first: it then gets the real
one.
"""

import sys

if __name__ == "queue":
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location("queue", sysconfig.get_path("stdlib") + "/queue.py")
    assert spec is not None and spec.loader is not None
    sys.modules["queue"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["queue"])

if __name__ == "__main__":
    from queue_speed import main

    main()
