"""An OTLP collector over gRPC that stores all spans it receives, of vLLM, the client and others."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


class Collector(TraceServiceServicer):
    """url is what --otlp-traces-endpoint takes; spans are protobuf Span messages."""

    def __init__(self):
        self.spans = []
        self.server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self.server)
        self.url = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return ExportTraceServiceResponse()

    def wait_for(self, n: int, trace_id: int, timeout_s: float = 90) -> list:
        """The spans of one trace, once there are n."""
        end = time.monotonic() + timeout_s
        while len(found := [s for s in self.spans if int.from_bytes(s.trace_id) == trace_id]) < n:
            assert time.monotonic() < end, f"{len(found)} of {n} spans came"
            time.sleep(0.1)
        return found
