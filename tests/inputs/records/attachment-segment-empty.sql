INSERT INTO bad VALUES ('attachments//10.0.0.4', '{"segment":"","address":"10.0.0.4","subscription":"11111111-0000-4000-8000-000000000002","workload":"vm","started":null}');
