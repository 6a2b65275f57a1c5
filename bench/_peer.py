"""watchdog and watchfiles, used as their documentation says; runs in their own environment.

python _peer.py NAME PATH

Prints READY, keeps what it is told, and prints it at SIGINT.
"""

import json
import signal
import sys
import threading
import time

stop = threading.Event()
kept = []  # ns, kind, path, old path


def run_watchdog(path):
    from watchdog.events import FileSystemEventHandler
    from watchdog.observers import Observer

    kinds = {
        "created": "created",
        "modified": "modified",
        "closed": "written",
        "moved": "renamed",
        "deleted": "deleted",
    }

    class Handler(FileSystemEventHandler):
        def on_any_event(self, event):
            kind = kinds.get(event.event_type)
            if kind:
                moved = kind == "renamed"
                path = event.dest_path if moved else event.src_path
                kept.append((time.monotonic_ns(), kind, path, event.src_path if moved else None))

    observer = Observer()
    observer.schedule(Handler(), path, recursive=True)
    observer.start()
    print("READY", flush=True)
    stop.wait()
    observer.stop()


def run_watchfiles(path):
    from watchfiles import Change
    from watchfiles._rust_notify import RustNotify

    # The class below watchfiles.watch(), with that function's defaults: watch() itself does not say
    # when its watches are set.
    kinds = {Change.added: "created", Change.modified: "modified", Change.deleted: "deleted"}
    with RustNotify([path], False, False, 300, True, False) as watcher:
        print("READY", flush=True)
        while not stop.is_set():
            changes = watcher.watch(1600, 50, 1000, stop)
            now = time.monotonic_ns()
            if isinstance(changes, set):
                kept.extend((now, kinds[Change(kind)], path, None) for kind, path in changes)
            elif changes == "signal":
                break


def main():
    name, path = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    {"watchdog": run_watchdog, "watchfiles": run_watchfiles}[name](path)
    for ns, kind, path, old in kept:
        line = {"type": "change", "kinds": [kind], "path": path, "old_path": old, "ns": ns}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
