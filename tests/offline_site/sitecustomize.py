"""What Python loads by itself: the network cut, and packages outside a plain install refused."""

import importlib.abc
import os
import socket
import sys
import time

REFUSED = frozenset(os.environ["OFFLINE_REFUSED"].split(":"))


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def cut(host, *args, **kwargs):
    raise socket.gaierror(socket.EAI_NONAME, f"the network is cut: {host}")


sys.meta_path.insert(0, Refuse())
socket.getaddrinfo = socket.gethostbyname = cut  # FTP asks the second
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.05))  # nothing comes back by waiting for it
