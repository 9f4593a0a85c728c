"""The call that reads rows out."""

from collections.abc import AsyncIterator, Iterator
from contextlib import closing

from veneer.dataset.v1 import dataset_service_pb2
from veneer_dataset.api.app import App, tenant
from veneer_dataset.api.example_wire import batch_messages, example_messages
from veneer_dataset.api.handover import drawn
from veneer_dataset.api.requests import examples_request
from veneer_dataset.domain.examples import PictureForm, Wanted
from veneer_rpc.threads import in_thread


class ExampleCalls:
    """See the contract."""

    _app: App

    async def ReadExamples(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.ReadExamplesRequest, context: object
    ) -> AsyncIterator[bytes]:
        checked, whose = examples_request(request), tenant()
        stored = await in_thread(self._app.versions.get, whose, checked.version.dataset, checked.version.version)
        counting = await self._app.models.counting(checked.model, request.max_pixels) if checked.model else None
        to_messages = batch_messages if request.batched else example_messages
        wanted = Wanted(
            request.split, checked.shuffle, request.offset, request.limit, checked.form, counting, request.batched
        )

        def serialized() -> Iterator[list[bytes] | None]:
            """ReadExamplesResponses on the wire, about 512 KiB of them at a time; None before what may wait."""
            with closing(self._app.examples.read(whose, stored, wanted)) as pieces:
                for piece in pieces:
                    if isinstance(piece, bytes):
                        yield [piece]
                    else:
                        yield to_messages(piece) if piece else None

        # Originals take little but what is in memory; all other forms are made in a thread, not where calls are served.
        async for some in drawn(serialized, in_threads=checked.form is not PictureForm.ORIGINAL):
            for message in some:
                yield message
