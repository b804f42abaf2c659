"""Which topic area each top-level module of the standard library belongs to.

A table, so that labels never depend on a model or on the machine.  Modules that only some versions
or distributions have are listed all the same: what is absent is not read.  ``encodings``,
``pydoc_data`` (machine-written) and ``lib2to3`` (one pattern repeated) are left out on purpose.
"""

from __future__ import annotations

AREAS: dict[str, tuple[str, ...]] = {
    "concurrency": (
        "_threading_local", "_weakrefset", "asynchat", "asyncio", "asyncore", "concurrent",
        "contextvars", "multiprocessing", "queue", "sched", "selectors", "signal", "subprocess",
        "threading",
    ),
    "data types and maths": (
        "_collections_abc", "_compat_pickle", "_py_abc", "_pydatetime", "_pydecimal", "_pylong",
        "_strptime", "abc", "bisect", "calendar", "collections", "copy", "copyreg", "dataclasses",
        "datetime", "decimal", "enum", "fractions", "functools", "graphlib", "hashlib", "heapq",
        "hmac", "ipaddress", "numbers", "operator", "random", "reprlib", "secrets", "statistics",
        "types", "typing", "uuid", "weakref", "zoneinfo",
    ),
    "files and OS": (
        "_compression", "_pyio", "bz2", "dbm", "filecmp", "fileinput", "fnmatch", "genericpath",
        "getpass", "glob", "gzip", "io", "linecache", "lzma", "mailcap", "mimetypes", "ntpath",
        "nturl2path", "os", "pathlib", "pickle", "pickletools", "pipes", "platform", "posixpath",
        "pty", "shelve", "shutil", "sqlite3", "stat", "tarfile", "tempfile", "tty", "xdrlib",
        "zipfile",
    ),
    "GUI and multimedia": (
        "aifc", "chunk", "colorsys", "curses", "idlelib", "imghdr", "sndhdr", "sunau", "tkinter",
        "turtle", "turtledemo", "wave",
    ),
    "networking": (
        "cgi", "cgitb", "ftplib", "http", "imaplib", "netrc", "nntplib", "poplib", "smtpd",
        "smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib", "webbrowser", "wsgiref",
        "xmlrpc",
    ),
    "packaging and import": (
        "_aix_support", "_bootsubprocess", "_osx_support", "_sitebuiltins", "compileall",
        "ctypes", "distutils", "ensurepip", "imp", "importlib", "modulefinder", "pkgutil",
        "py_compile", "runpy", "site", "sysconfig", "venv", "zipapp", "zipimport",
    ),
    "testing and debugging": (
        "_pyrepl", "ast", "bdb", "cProfile", "code", "codeop", "contextlib", "dis", "doctest",
        "inspect", "logging", "pdb", "profile", "pstats", "pyclbr", "pydoc", "rlcompleter",
        "symtable", "tabnanny", "timeit", "trace", "traceback", "tracemalloc", "unittest",
        "warnings",
    ),
    "text and markup": (
        "_markupbase", "argparse", "base64", "cmd", "codecs", "configparser", "csv", "difflib",
        "email", "getopt", "gettext", "html", "json", "locale", "mailbox", "optparse", "plistlib",
        "pprint", "quopri", "re", "shlex", "sre_compile", "sre_constants", "sre_parse", "string",
        "stringprep", "textwrap", "token", "tokenize", "tomllib", "uu", "xml",
    ),
}  # fmt: skip
