INSERT INTO bad VALUES ('subscriptions/11111111-0000-4000-8000-000000000002', '{"id":"' || hex(zeroblob(500000)) || '"}');
