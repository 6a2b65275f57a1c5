"""The peers that are libraries or servers, used as their documentation says, each in its own venv.

python _peer.py NAME PATH [--check]

Prints READY, keeps what it is told, and prints it at SIGINT. The last line says what the peer used
until then (the printing is the bench's, not the peer's) and how often it said that something was
lost. With --check the name of each deletion is opened as soon as it is told; what opens is `stale`.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time

stop = threading.Event()
check = False
kept = []  # ns, kind, path, old path
told = {"lost": 0, "stale": 0, "deletes_told": 0}


def keep(kind, path, old=None):
    kept.append((time.monotonic_ns(), kind, path, old))
    if check and kind == "deleted":
        told["deletes_told"] += 1
        told["stale"] += opens(path)


def opens(path):
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return False
    return True


def ready():
    print("READY", flush=True)


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
                keep(kind, path, event.src_path if moved else None)

    observer = Observer()
    observer.schedule(Handler(), path, recursive=True)
    observer.start()
    ready()
    stop.wait()
    observer.stop()


def run_watchfiles(path):
    from watchfiles import Change
    from watchfiles._rust_notify import RustNotify

    # The class below watchfiles.watch(), with that function's defaults: watch() itself does not say
    # when its watches are set.
    kinds = {Change.added: "created", Change.modified: "modified", Change.deleted: "deleted"}
    with RustNotify([path], False, False, 300, True, False) as watcher:
        ready()
        while not stop.is_set():
            changes = watcher.watch(1600, 50, 1000, stop)
            if isinstance(changes, set):
                for kind, changed in changes:
                    keep(kinds[Change(kind)], changed)
            elif changes == "signal":
                break


INOTIFY = ("CREATE", "MODIFY", "CLOSE_WRITE", "MOVED_FROM", "MOVED_TO", "DELETE")
KIND = {
    "CREATE": "created",
    "MODIFY": "modified",
    "CLOSE_WRITE": "written",
    "MOVED_FROM": "moved_away",
    "MOVED_TO": "renamed",
    "DELETE": "deleted",
}


def run_inotify_simple(path):
    """With the recursion that its documentation leaves to the program, the plain way."""
    from inotify_simple import INotify, flags

    kinds = [(int(flags[name]), KIND[name]) for name in INOTIFY]
    mask = sum(bit for bit, _ in kinds)
    directories = {}
    inotify = INotify()

    def add(top):
        for where, _, _ in os.walk(top):
            try:
                directories[inotify.add_watch(where, mask | flags.ONLYDIR)] = where
            except FileNotFoundError:
                continue

    add(path)
    ready()
    while not stop.is_set():
        for event in inotify.read(timeout=200):
            if event.mask & flags.Q_OVERFLOW:
                told["lost"] += 1
                continue
            where = directories.get(event.wd)
            if where is None or event.mask & flags.IGNORED:
                directories.pop(event.wd, None)
                continue
            full = f"{where}/{event.name}" if event.name else where
            for bit, kind in kinds:
                if event.mask & bit:
                    keep(kind, full)
            if event.mask & flags.ISDIR and event.mask & (flags.CREATE | flags.MOVED_TO):
                add(full)


def run_asyncinotify(path):
    import asyncio
    from pathlib import Path

    from asyncinotify import Inotify, Mask, RecursiveWatcher

    kinds = [(int(Mask[name]), KIND[name]) for name in INOTIFY]
    mask = Mask.Q_OVERFLOW
    for name in INOTIFY:
        mask |= Mask[name]

    class Watcher(RecursiveWatcher):
        # It does not say when its watches are set: it reads from then on.
        def _get_directories_recursive(self, top):
            yield from super()._get_directories_recursive(top)
            if top == self._path:
                ready()

    async def main():
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        with Inotify() as inotify:
            async for event in Watcher(Path(path), mask).watch_recursive(inotify):
                bits = int(event.mask)
                if bits & int(Mask.Q_OVERFLOW):
                    told["lost"] += 1
                elif event.path is not None:
                    full = str(event.path)
                    for bit, kind in kinds:
                        if bits & bit:
                            keep(kind, full)

    try:
        asyncio.run(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        return


def run_pyfanotify(path):
    import select

    import pyfanotify as fan

    kinds = [(getattr(fan, f"FAN_{name}"), KIND[name]) for name in INOTIFY]
    mask = sum(bit for bit, _ in kinds)
    watcher = fan.Fanotify(init_fid=True)
    watcher.mark(path, is_type="fs", ev_types=mask | fan.FAN_ONDIR)
    watcher.start()
    client = fan.FanotifyClient(watcher, path_pattern=os.path.join(path, "*"))
    time.sleep(0.5)  # its process takes the client up some time later and does not say when
    ready()
    while not stop.is_set():
        select.select([client.sock], [], [], 0.2)
        for event in client.get_events():
            if event.ev_types & fan.FAN_Q_OVERFLOW:
                told["lost"] += 1
            for name in event.path[:1]:
                for bit, kind in kinds:
                    if event.ev_types & bit:
                        keep(kind, os.fsdecode(name))
    client.close()
    watcher.stop()


def run_wtr_watcher(path):
    from watcher import EffectType, PathType, Watch

    kinds = {
        EffectType.CREATE: "created",
        EffectType.MODIFY: "modified",
        EffectType.RENAME: "renamed",
        EffectType.DESTROY: "deleted",
    }

    live = threading.Event()

    def callback(event):
        if event.path_type is PathType.WATCHER:
            text = event.path_name
            if "s/self/live" in text:
                live.set()
            elif "q_overflow" in text:
                told["lost"] += 1
            return
        kind = kinds.get(event.effect_type)
        if kind == "renamed" and event.associated_path_name:
            keep(kind, event.associated_path_name, event.path_name)
        elif kind:
            keep(kind, event.path_name)

    with Watch(path, callback):
        live.wait(60)
        ready()
        stop.wait()


def run_watchman(path):
    """A server of our own; what changed since the clock of the start is asked for at the end."""
    import socket

    with tempfile.TemporaryDirectory(prefix="fanwise-watchman-") as state:
        argv = ["watchman", "--foreground", "--no-save-state", "-U", f"{state}/sock"]
        argv += ["-o", f"{state}/log", "--pidfile", f"{state}/pid"]
        environ = {**os.environ, "HOME": state}
        with subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL) as server:
            try:
                channel = connect(socket.socket(socket.AF_UNIX), f"{state}/sock", server)
                lines = channel.makefile("rw")

                def ask(*command):
                    lines.write(json.dumps(command) + "\n")
                    lines.flush()
                    answer = json.loads(lines.readline())
                    if "error" in answer:
                        sys.exit(f"watchman: {answer['error']}")
                    if "recrawl" in answer.get("warning", "").lower():
                        told["lost"] += 1
                    return answer

                ask("watch", path)
                clock = ask("clock", path, {"sync_timeout": 110_000})["clock"]
                ready()
                stop.wait()
                fields = ["name", "exists", "new"]
                for file in ask("query", path, {"since": clock, "fields": fields})["files"]:
                    kind = "created" if file["new"] else "modified"
                    keep(kind if file["exists"] else "deleted", f"{path}/{file['name']}")
                ask("shutdown-server")
                server.wait(30)
            finally:
                server.kill()


def connect(channel, where, server):
    end = time.monotonic() + 20
    while True:
        try:
            channel.connect(where)
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.02)
            continue
        return channel


def used():
    """Processor seconds of this process and of the children it waited for."""
    found = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        found += usage.ru_utime + usage.ru_stime
    return found


PEERS = {
    "watchdog": run_watchdog,
    "watchfiles": run_watchfiles,
    "inotify-simple": run_inotify_simple,
    "asyncinotify": run_asyncinotify,
    "pyfanotify": run_pyfanotify,
    "wtr-watcher": run_wtr_watcher,
    "watchman": run_watchman,
}


def main():
    global check
    name, path, *more = sys.argv[1:]
    check = "--check" in more
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        PEERS[name](path)
    except Exception as error:
        # What it told before it failed counts all the same; that it failed is told below.
        print(f"{type(error).__name__}: {error}", flush=True)
        if not kept:
            raise
        told["error"] = f"failed: {type(error).__name__}: {error}"
    closing = {"type": "stopped", "cpu_s": used(), **told}
    # A peer that still calls back must not change what is being printed.
    for ns, kind, path, old in list(kept):
        line = {"type": "change", "kinds": [kind], "path": path, "old_path": old, "ns": ns}
        print(json.dumps(line))
    print(json.dumps(closing), flush=True)
    # Threads of a peer that never comes to rest would keep the interpreter.
    os._exit(0)


if __name__ == "__main__":
    main()
