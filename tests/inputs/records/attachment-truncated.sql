INSERT INTO bad VALUES ('attachments/vni1002/10.0.0.0/24', '{"segment":"vni1002","address":"10.0.0.0/24","subscription":"11111111-0000-4000-8000-000000000002","workload":"vm","started":null');
