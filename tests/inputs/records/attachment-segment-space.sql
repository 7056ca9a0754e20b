INSERT INTO bad VALUES ('attachments/vni 1/10.0.0.4', '{"segment":"vni 1","address":"10.0.0.4","subscription":"11111111-0000-4000-8000-000000000002","workload":"vm","started":null}');
