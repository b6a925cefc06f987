"""The SQLite schema, as the steps that lead to it. A released step is never edited; new ones follow."""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE personas (
            "id" TEXT PRIMARY KEY,
            "name" TEXT NOT NULL,
            "text" TEXT NOT NULL,
            "system_prompt" TEXT NOT NULL,
            "cast" TEXT NOT NULL,
            "sparsity" REAL NOT NULL,
            "recovery" TEXT NOT NULL,
            "preset" TEXT NOT NULL,
            "teacher" TEXT NOT NULL,
            "base" TEXT NOT NULL,
            "version" INTEGER,
            "flagged" INTEGER NOT NULL,
            "deleted" INTEGER NOT NULL,
            "seed" INTEGER NOT NULL,
            "created" TEXT NOT NULL,
            "updated" TEXT NOT NULL,
            "last_version" INTEGER NOT NULL DEFAULT 0
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE versions (
            "persona_id" TEXT NOT NULL,
            "number" INTEGER NOT NULL,
            "digest" TEXT NOT NULL,
            "text" TEXT NOT NULL,
            "system_prompt" TEXT NOT NULL,
            "prompt_sha256" TEXT NOT NULL,
            "sparsity" REAL NOT NULL,
            "recovery" TEXT NOT NULL,
            "kept" INTEGER NOT NULL,
            "intermediate_size" INTEGER NOT NULL,
            "bytes" INTEGER NOT NULL,
            "source" TEXT NOT NULL,
            "created" TEXT NOT NULL,
            PRIMARY KEY ("persona_id", "number")
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE jobs (
            "position" INTEGER PRIMARY KEY AUTOINCREMENT,
            "id" TEXT NOT NULL UNIQUE,
            "persona_id" TEXT NOT NULL,
            "status" TEXT NOT NULL,
            "stage" TEXT NOT NULL,
            "completed" INTEGER NOT NULL,
            "total" INTEGER NOT NULL,
            "eta_s" REAL,
            "error" TEXT,
            "spec" TEXT NOT NULL,
            "attempts" INTEGER NOT NULL,
            "worker" TEXT,
            "lease_expires" REAL,
            "cancel_requested" INTEGER NOT NULL,
            "created" TEXT NOT NULL,
            "updated" TEXT NOT NULL
        )
        """,
        'CREATE INDEX jobs_by_persona ON jobs ("persona_id", "position")',
        """CREATE INDEX jobs_open ON jobs ("position") WHERE "status" IN ('queued', 'running')""",
        """
        CREATE TABLE events (
            "seq" INTEGER PRIMARY KEY AUTOINCREMENT,
            "persona_id" TEXT NOT NULL,
            "job_id" TEXT,
            "type" TEXT NOT NULL,
            "data" TEXT NOT NULL,
            "created" TEXT NOT NULL
        )
        """,
        'CREATE INDEX events_by_persona ON events ("persona_id", "seq")',
        """
        CREATE TABLE idempotency_keys (
            "key" TEXT PRIMARY KEY,
            "body_sha256" TEXT,
            "persona_id" TEXT NOT NULL,
            "job_id" TEXT,
            "created_s" REAL NOT NULL
        ) WITHOUT ROWID
        """,
    ),
    (
        """ALTER TABLE versions ADD COLUMN "attached" TEXT NOT NULL DEFAULT ''""",
        'ALTER TABLE versions ADD COLUMN "attached_bytes" INTEGER NOT NULL DEFAULT 0',
    ),
)
