INSERT INTO bad VALUES ('attachments/vni1002/2001:DB8::1', '{"segment":"vni1002","address":"2001:db8::1","subscription":"11111111-0000-4000-8000-000000000002","workload":"vm","started":null}');
