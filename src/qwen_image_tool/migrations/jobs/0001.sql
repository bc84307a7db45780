-- number: order of arrival. position: order among the queued ones.
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL DEFAULT 'queued'
        CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    position REAL NOT NULL,
    request TEXT NOT NULL,
    origin TEXT NOT NULL DEFAULT '',
    anyway INTEGER NOT NULL DEFAULT 0,
    again INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    plan TEXT,
    seconds TEXT NOT NULL DEFAULT '{}',
    failure TEXT
);
CREATE INDEX jobs_waiting ON jobs (position) WHERE state = 'queued';
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE TRIGGER jobs_end_once BEFORE UPDATE ON jobs
WHEN OLD.state IN ('done', 'failed', 'cancelled')
BEGIN
    SELECT RAISE(ABORT, 'the job has ended');
END;
CREATE TRIGGER jobs_one_at_a_time BEFORE UPDATE OF state ON jobs
WHEN NEW.state = 'running' AND OLD.state != 'queued'
BEGIN
    SELECT RAISE(ABORT, 'only a queued job can start');
END;
