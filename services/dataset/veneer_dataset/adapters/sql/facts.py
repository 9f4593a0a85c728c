"""What decoding pictures told, in the database."""

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from veneer_dataset.adapters.sql.blobs import chunks, insert_ignoring
from veneer_dataset.adapters.sql.database import Database
from veneer_dataset.domain.pictures import PictureFacts


class SqlFacts:
    """A FactStore."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._facts = database.table("picture_facts")

    def find(self, tenant: str, digests: Sequence[str]) -> Mapping[str, PictureFacts]:
        """See FactStore."""
        table, found = self._facts, dict[str, PictureFacts]()
        with self._database.read() as connection:
            for some in chunks(digests):
                wanted = sa.select(table).where(table.c.tenant == tenant, table.c.digest.in_(some))
                for row in connection.execute(wanted):
                    found[row.digest] = PictureFacts(
                        row.width, row.height, int(row.perceptual_hash, 16), row.code, row.found
                    )
        return found

    def add(self, tenant: str, facts: Mapping[str, PictureFacts]) -> None:
        """See FactStore."""
        if not facts:
            return
        values = [
            {
                "tenant": tenant,
                "digest": digest,
                "width": each.width,
                "height": each.height,
                "perceptual_hash": f"{each.perceptual_hash:016x}",  # 64 bits without a sign are no SQL integer
                "code": each.code,
                "found": each.found,
            }
            for digest, each in facts.items()
        ]
        with self._database.write() as connection:
            connection.execute(insert_ignoring(self._database, self._facts), values)
