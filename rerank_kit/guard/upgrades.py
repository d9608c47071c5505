"""Bodies of requests that offer HTTP/2 by `Upgrade: h2c`, as Java's HttpClient does over http unless told not to.

A server may ignore the offer and answer as HTTP/1.1 (RFC 9110, 7.8). uvicorn 0.54 does, but its parser, httptools,
takes the message for complete at the end of its head: the application sees an empty body, and the body's bytes are
read as the next request. Here the body is read by a second parser, which also reads what follows on that connection.
"""

import sys
from contextlib import suppress

FRAMING = (b"content-length", b"transfer-encoding")
METHODS = ("on_headers_complete", "on_message_complete", "_unsupported_upgrade_warning", "data_received")


def read_bodies() -> None:
    """Change uvicorn's protocol for this process; once, and nothing where uvicorn runs without httptools."""
    try:
        import httptools
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return
    if hasattr(HttpToolsProtocol, "body_begins") or not all(hasattr(HttpToolsProtocol, name) for name in METHODS):
        return
    theirs = {name: getattr(HttpToolsProtocol, name) for name in METHODS}

    def on_headers_complete(self):
        if self.parser.should_upgrade() and not self._should_upgrade():
            self.framing = [header for header in self.headers if header[0] in FRAMING]
        theirs["on_headers_complete"](self)

    def on_message_complete(self):
        if not self.framing:  # else it is the end of the head
            theirs["on_message_complete"](self)

    def unsupported_upgrade(self):
        if self.framing:
            # uvicorn is handling HttpParserUpgrade, which says where in the data the head ended.
            self.body_begins = sys.exception().args[0]
        else:
            theirs["_unsupported_upgrade_warning"](self)

    def data_received(self, data):
        theirs["data_received"](self, data)
        while self.body_begins is not None:
            data, self.body_begins = data[self.body_begins :], None
            try:
                self.parser = _parser_of_the_rest(httptools, self)
            except httptools.HttpParserError:  # a Transfer-Encoding that says nothing of the body's end
                self.send_400_response("Invalid HTTP request received.")
                return
            theirs["data_received"](self, data)

    ours = (on_headers_complete, on_message_complete, unsupported_upgrade, data_received)
    for name, value in {**dict(zip(METHODS, ours, strict=True)), "framing": None, "body_begins": None}.items():
        setattr(HttpToolsProtocol, name, value)


def _parser_of_the_rest(httptools, protocol):
    """A parser that stands at the beginning of the body of `protocol`'s present request."""
    rest = _Rest(protocol)
    parser = httptools.HttpRequestParser(rest)
    with suppress(AttributeError):  # as uvicorn does
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
    head = b"".join(b"%s: %s\r\n" % header for header in protocol.framing)
    protocol.framing = None
    parser.feed_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n")
    rest.knows_head = False
    return parser


class _Rest:
    """Hands on what the parser finds, but for the head that the protocol has seen already."""

    def __init__(self, protocol):
        self.protocol, self.knows_head = protocol, True
        self.on_body = protocol.on_body

    def on_message_begin(self):
        if not self.knows_head:
            self.protocol.on_message_begin()

    def on_url(self, url):
        if not self.knows_head:
            self.protocol.on_url(url)

    def on_header(self, name, value):
        if not self.knows_head:
            self.protocol.on_header(name, value)

    def on_headers_complete(self):
        if not self.knows_head:
            self.protocol.on_headers_complete()

    def on_message_complete(self):
        self.protocol.on_message_complete()
