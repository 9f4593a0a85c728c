"""The database's schema, as the steps that lead to it. A step that was released never changes; append one.

`{key}` stands for a number that the database gives each row, `{bytes}` for a byte string.
"""

STEPS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE secrets (name TEXT PRIMARY KEY, value {bytes} NOT NULL)",
        """CREATE TABLE datasets (
            id {key}, tenant TEXT NOT NULL, dataset_id TEXT NOT NULL, uid TEXT NOT NULL,
            display_name TEXT NOT NULL, default_prompt TEXT NOT NULL, labels TEXT NOT NULL,
            latest_version TEXT NOT NULL, created_us BIGINT NOT NULL, updated_us BIGINT NOT NULL,
            revision BIGINT NOT NULL, UNIQUE (tenant, dataset_id))""",
        """CREATE TABLE versions (
            id {key}, dataset BIGINT NOT NULL REFERENCES datasets (id), digest TEXT NOT NULL,
            canonicaliser_version INTEGER NOT NULL, splits TEXT NOT NULL, report TEXT NOT NULL,
            labels TEXT NOT NULL, picture_size_bytes BIGINT NOT NULL, picture_count BIGINT NOT NULL,
            created_us BIGINT NOT NULL, UNIQUE (dataset, digest))""",
        """CREATE TABLE version_rows (
            version BIGINT NOT NULL REFERENCES versions (id), position BIGINT NOT NULL,
            digest {bytes} NOT NULL, content {bytes} NOT NULL, PRIMARY KEY (version, position))""",
        """CREATE TABLE findings (
            version BIGINT NOT NULL REFERENCES versions (id), number BIGINT NOT NULL, code TEXT NOT NULL,
            severity INTEGER NOT NULL, path TEXT NOT NULL, line BIGINT NOT NULL, json_path TEXT NOT NULL,
            found TEXT NOT NULL, PRIMARY KEY (version, number))""",
        "CREATE INDEX findings_by_code ON findings (version, code, number)",
        """CREATE TABLE holds (
            version BIGINT NOT NULL REFERENCES versions (id), holder TEXT NOT NULL, expires_us BIGINT NOT NULL,
            PRIMARY KEY (version, holder))""",
        """CREATE TABLE version_pictures (
            version BIGINT NOT NULL REFERENCES versions (id), tenant TEXT NOT NULL, digest TEXT NOT NULL,
            PRIMARY KEY (version, digest))""",
        "CREATE INDEX version_pictures_by_digest ON version_pictures (tenant, digest)",
        """CREATE TABLE blobs (
            tenant TEXT NOT NULL, digest TEXT NOT NULL, size_bytes BIGINT NOT NULL, location TEXT NOT NULL UNIQUE,
            asked_us BIGINT NOT NULL, PRIMARY KEY (tenant, digest))""",
        "CREATE INDEX blobs_by_asked ON blobs (asked_us)",
        """CREATE TABLE picture_facts (
            tenant TEXT NOT NULL, digest TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
            perceptual_hash TEXT NOT NULL, code TEXT NOT NULL, found TEXT NOT NULL, PRIMARY KEY (tenant, digest))""",
        """CREATE TABLE requests (
            tenant TEXT NOT NULL, method TEXT NOT NULL, request_id TEXT NOT NULL, body_sha256 {bytes} NOT NULL,
            result {bytes} NOT NULL, created_us BIGINT NOT NULL, PRIMARY KEY (tenant, method, request_id))""",
        "CREATE INDEX requests_by_created ON requests (created_us)",
    ),
)
