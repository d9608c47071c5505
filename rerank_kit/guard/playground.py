"""GET /playground: one static page to try queries and documents in a browser; off unless ALLOW_PATHS opens it."""

from pathlib import Path

PATH = "/playground"
HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    # The page's own script and style, and calls of this service: nothing from outside, in no other site's frame.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


async def send_page(send) -> None:
    page = Path(__file__).with_name("playground.html").read_bytes()
    headers = [*HEADERS, (b"content-length", str(len(page)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": page})
