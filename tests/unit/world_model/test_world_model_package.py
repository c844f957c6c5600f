import world_model


def test_exported_names_exist_and_are_sorted():
    assert world_model.__all__ == sorted(world_model.__all__)
    assert all(hasattr(world_model, name) for name in world_model.__all__)
