INSERT INTO bad VALUES (5, '{"id":"11111111-0000-4000-8000-000000000002","offer":"pay-as-you-go","created":"2022-06-30","name":"fabrikam","standing":"good","payment_history":true,"mode":"enforce"}');
