BEGIN TRANSACTION;
CREATE TABLE change (
  revision INTEGER NOT NULL REFERENCES revision, key TEXT NOT NULL, before TEXT, after TEXT,
  PRIMARY KEY (revision, key)
) WITHOUT ROWID;
INSERT INTO "change" VALUES(1,'attachments/vni1001/10.0.0.4',NULL,'{"segment":"vni1001","address":"10.0.0.4","subscription":"11111111-0000-4000-8000-000000000001","workload":"vm","started":"2026-01-10T08:00:00Z"}');
INSERT INTO "change" VALUES(1,'subscriptions/11111111-0000-4000-8000-000000000001',NULL,'{"id":"11111111-0000-4000-8000-000000000001","offer":"enterprise-agreement","created":"2021-03-02","name":"contoso-prod","standing":"good","payment_history":false,"mode":"enforce"}');
INSERT INTO "change" VALUES(2,'attachments/vni1002/10.0.0.0/24',NULL,'{"segment":"vni1002","address":"10.0.0.0/24","subscription":"11111111-0000-4000-8000-000000000002","workload":"vm","started":null}');
INSERT INTO "change" VALUES(2,'exemptions/11111111-0000-4000-8000-000000000002',NULL,'{"subscription":"11111111-0000-4000-8000-000000000002","state":"granted","requested":"2026-01-08T09:00:00Z","decided":"2026-01-09T12:00:00Z","until":null,"by":"self-service","justification":"","reason":"","details":null,"fraud_check":null,"fraud_note":"","limit":null}');
INSERT INTO "change" VALUES(2,'subscriptions/11111111-0000-4000-8000-000000000002',NULL,'{"id":"11111111-0000-4000-8000-000000000002","offer":"pay-as-you-go","created":"2022-06-30","name":"fabrikam","standing":"good","payment_history":true,"mode":"enforce"}');
INSERT INTO "change" VALUES(3,'attachments/vni1001/10.0.0.4','{"segment":"vni1001","address":"10.0.0.4","subscription":"11111111-0000-4000-8000-000000000001","workload":"vm","started":"2026-01-10T08:00:00Z"}',NULL);
INSERT INTO "change" VALUES(4,'attachments/vni1001/10.0.0.4',NULL,'{"segment":"vni1001","address":"10.0.0.4","subscription":"11111111-0000-4000-8000-000000000001","workload":"vm","started":"2026-01-10T08:00:00Z"}');
INSERT INTO "change" VALUES(4,'subscriptions/11111111-0000-4000-8000-000000000001','{"id":"11111111-0000-4000-8000-000000000001","offer":"enterprise-agreement","created":"2021-03-02","name":"contoso-prod","standing":"good","payment_history":false,"mode":"enforce"}','{"name":"ünïcode \u0007 \"quoted\""}');
INSERT INTO "change" VALUES(5,'subscriptions/11111111-0000-4000-8000-000000000001','{"name":"ünïcode \u0007 \"quoted\""}','{"id":"11111111-0000-4000-8000-000000000001","offer":"enterprise-agreement","created":"2021-03-02","name":"contoso-prod","standing":"good","payment_history":false,"mode":"enforce"}');
CREATE TABLE record (key TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "record" VALUES('attachments/vni1001/10.0.0.4','{"segment":"vni1001","address":"10.0.0.4","subscription":"11111111-0000-4000-8000-000000000001","workload":"vm","started":"2026-01-10T08:00:00Z"}');
INSERT INTO "record" VALUES('attachments/vni1002/10.0.0.0/24','{"segment":"vni1002","address":"10.0.0.0/24","subscription":"11111111-0000-4000-8000-000000000002","workload":"vm","started":null}');
INSERT INTO "record" VALUES('exemptions/11111111-0000-4000-8000-000000000002','{"subscription":"11111111-0000-4000-8000-000000000002","state":"granted","requested":"2026-01-08T09:00:00Z","decided":"2026-01-09T12:00:00Z","until":null,"by":"self-service","justification":"","reason":"","details":null,"fraud_check":null,"fraud_note":"","limit":null}');
INSERT INTO "record" VALUES('subscriptions/11111111-0000-4000-8000-000000000001','{"id":"11111111-0000-4000-8000-000000000001","offer":"enterprise-agreement","created":"2021-03-02","name":"contoso-prod","standing":"good","payment_history":false,"mode":"enforce"}');
INSERT INTO "record" VALUES('subscriptions/11111111-0000-4000-8000-000000000002','{"id":"11111111-0000-4000-8000-000000000002","offer":"pay-as-you-go","created":"2022-06-30","name":"fabrikam","standing":"good","payment_history":true,"mode":"enforce"}');
CREATE TABLE revision (number INTEGER PRIMARY KEY, at TEXT NOT NULL, actor TEXT NOT NULL);
INSERT INTO "revision" VALUES(1,'2026-06-01T12:00:00+00:00','ada');
INSERT INTO "revision" VALUES(2,'2026-06-01T12:00:00+00:00','grace');
INSERT INTO "revision" VALUES(3,'2026-06-01T12:00:00+00:00','ada');
INSERT INTO "revision" VALUES(4,'2026-06-01T12:00:00+00:00','grace');
INSERT INTO "revision" VALUES(5,'2026-06-01T12:00:00+00:00','ada');
CREATE TABLE store (identity BLOB NOT NULL);
INSERT INTO "store" VALUES(X'30313233343536373839616263646566');
CREATE TRIGGER revision_stays BEFORE UPDATE ON revision BEGIN SELECT RAISE(ABORT, 'the log only grows'); END;
CREATE TRIGGER revision_kept BEFORE DELETE ON revision BEGIN SELECT RAISE(ABORT, 'the log only grows'); END;
CREATE TRIGGER change_stays BEFORE UPDATE ON change BEGIN SELECT RAISE(ABORT, 'the log only grows'); END;
CREATE TRIGGER change_kept BEFORE DELETE ON change BEGIN SELECT RAISE(ABORT, 'the log only grows'); END;
COMMIT;
PRAGMA user_version = 1;
